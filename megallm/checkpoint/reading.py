"""A checkpoint as logical tensors: any box of any of them, whichever files hold it, without a process group."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint.boxes import WEIGHTS
from megallm.checkpoint.manifest import (
    CHUNK_BYTES,
    DTYPES,
    DamagedError,
    Manifest,
    SavedBox,
    SavedTensor,
    read_manifest,
)
from megallm.checkpoint.shard_file import ShardReader, bytes_of, whole_chunks

# What one step reads, rounded up to whole rows of a tensor where only a part of its columns is wanted.
SLAB_BYTES = 16 * CHUNK_BYTES
# While one waits for the disk, another compares and copies.
_THREADS = 2
# A process may often have no more than 1,024 files open, and a checkpoint have more than that.
_MOST_OPEN = 128


class OpenCheckpoint:
    """Reads boxes of a checkpoint's tensors. Every byte that it gives was compared with its checksum.

    To be used in a `with` block. Only files that hold a part of what is asked for are opened, and only the rows of a
    tensor that are needed are read, rounded to chunks that have a checksum.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint")
        self._under_way: list[Future[None]] = []

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def names(self, kind: str = WEIGHTS) -> list[str]:
        """Names of the tensors of a kind, in the order in which they were saved."""
        return [name.removeprefix(f"{kind}/") for name in self.manifest.tensors if name.startswith(f"{kind}/")]

    def saved(self, kind: str, name: str) -> SavedTensor:
        """Type, shape and place of a tensor. Raises ValueError if there is none of that name."""
        found = self.manifest.tensors.get(f"{kind}/{name}")
        if found is None:
            raise ValueError(f"{self.folder} holds no {kind} of {name}: is it a checkpoint of another model?")
        return found

    def read(
        self, kind: str, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """A new tensor on the CPU, of the type that was saved: the box [offset, offset + shape), by default the whole.

        Raises:
            DamagedError: something of it is not as it was written.
            ValueError: there is no tensor of that name.
        """
        saved = self.saved(kind, name)
        tensor = torch.empty(saved.shape if shape is None else shape, dtype=DTYPES[saved.dtype])
        self.fill(kind, name, (0,) * tensor.dim() if offset is None else offset, tensor)
        return tensor

    def tensors(self, kind: str = WEIGHTS) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of all tensors of a kind, each read when it is asked for."""
        for name in self.names(kind):
            yield name, self.read(kind, name)

    def fill(self, kind: str, name: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Fills `tensor` with the box of its shape that begins at `offset`; converts where the types differ.

        Raises:
            DamagedError: something of it is not as it was written. It may be in `tensor` by then.
            ValueError: there is no tensor of that name.
        """
        self.start_filling(kind, name, offset, tensor)
        self.wait()

    @torch.no_grad()
    def start_filling(self, kind: str, name: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """The same without waiting: `tensor` is full, and its damage told, after the next `wait`."""
        saved = self.saved(kind, name)
        filled = 0
        for source in saved.boxes:
            common = _overlap(source, offset, tuple(tensor.shape))
            if common is not None:
                self._start_copying(f"{kind}/{name}", saved, source, offset, tensor, *common)
                filled += math.prod(b - a for a, b in zip(*common, strict=True))
        if filled != tensor.numel():
            raise DamagedError(
                f"{self.folder} holds {filled} of {tensor.numel()} elements of {kind}/{name} at {offset}"
            )

    def wait(self) -> None:
        """Returns when everything that was begun is full. Raises DamagedError as `fill` does."""
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            future.result()

    def _start_copying(
        self,
        name: str,
        saved: SavedTensor,
        source: SavedBox,
        offset: tuple[int, ...],
        tensor: torch.Tensor,
        begin: tuple[int, ...],
        end: tuple[int, ...],
    ) -> None:
        """Sets the threads to copy what lies between two corners from a saved box to `tensor`."""
        reader, dtype = self._reader(source.file), DTYPES[saved.dtype]
        row_bytes = source.num_bytes // source.shape[0]
        first, last = ((row - source.offset[0]) * row_bytes for row in (begin[0], end[0]))
        rows = tensor[begin[0] - offset[0] : end[0] - offset[0]]
        if source.offset[1:] == offset[1:] and source.shape[1:] == tuple(tensor.shape[1:]) and rows.is_contiguous():
            flat = rows.view(-1)
            for start, stop in _cuts(first, last, source.num_bytes):
                target = flat[(start - first) // dtype.itemsize : (stop - first) // dtype.itemsize]
                self._submit(_read_range, reader, name, source, dtype, start, stop, target)
            return
        there, here = (
            tuple(slice(a - o, b - o) for a, b, o in zip(begin[1:], end[1:], origin[1:], strict=True))
            for origin in (source.offset, offset)
        )
        step = max(1, SLAB_BYTES // row_bytes)
        for row in range(0, len(rows), step):
            target = rows[(slice(row, row + step), *here)]
            start = first + row * row_bytes
            self._submit(_read_columns, reader, name, source, dtype, start, row_bytes * len(target), there, target)

    def _submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._under_way.append(self._threads.submit(function, *arguments))

    def _reader(self, number: int) -> ShardReader:
        if number in self._readers:
            self._readers.move_to_end(number)
        else:
            if len(self._readers) == _MOST_OPEN:
                # The threads may still read from the one that goes.
                self.wait()
                self._readers.popitem(last=False)[1].close()
            self._readers[number] = ShardReader(self.folder, self.manifest.files[number])
        return self._readers[number]


@torch.no_grad()
def _read_range(
    reader: ShardReader, name: str, source: SavedBox, dtype: torch.dtype, first: int, last: int, target: torch.Tensor
) -> None:
    """Fills a flat tensor with the bytes [first, last) of a saved box."""
    begin, end = whole_chunks(first, last, source.num_bytes)
    if (begin, end) == (first, last) and target.dtype == dtype and target.device.type == "cpu":
        reader.read(name, source, first, bytes_of(target))
        return
    data = torch.empty(end - begin, dtype=torch.uint8)
    reader.read(name, source, begin, bytes_of(data))
    target.copy_(data[first - begin : last - begin].view(dtype))


@torch.no_grad()
def _read_columns(
    reader: ShardReader,
    name: str,
    source: SavedBox,
    dtype: torch.dtype,
    first: int,
    num_bytes: int,
    there: tuple[slice, ...],
    target: torch.Tensor,
) -> None:
    """Fills a tensor [rows, ...] with the columns `there` of the rows of a saved box that begin at byte `first`."""
    begin, end = whole_chunks(first, first + num_bytes, source.num_bytes)
    data = torch.empty(end - begin, dtype=torch.uint8)
    reader.read(name, source, begin, bytes_of(data))
    # [bytes] -> [rows, ...], as the source has them
    values = data[first - begin : first - begin + num_bytes].view(dtype).view(len(target), *source.shape[1:])
    target.copy_(values[(slice(None), *there)])


def _cuts(first: int, last: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Bytes [first, last) of a saved box in pieces that are whole chunks, but for the first and the last one."""
    while first < last:
        stop = first // CHUNK_BYTES * CHUNK_BYTES + (CHUNK_BYTES if first % CHUNK_BYTES else SLAB_BYTES)
        if stop > last != num_bytes and first % CHUNK_BYTES == 0 and last // CHUNK_BYTES * CHUNK_BYTES > first:
            stop = last // CHUNK_BYTES * CHUNK_BYTES
        yield first, min(stop, last)
        first = stop


def open_checkpoint(folder: Path) -> OpenCheckpoint:
    """The checkpoint in a folder `iter_...`. Raises DamagedError where its manifest is not as it was written."""
    return OpenCheckpoint(folder, read_manifest(folder))


def _overlap(
    source: SavedBox, offset: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """First corner and the one behind the last of what a saved box and the box of a tensor share, if they do."""
    begin = tuple(max(a, b) for a, b in zip(offset, source.offset, strict=True))
    ends = zip(offset, shape, source.offset, source.shape, strict=True)
    end = tuple(min(a + n, b + m) for a, n, b, m in ends)
    return (begin, end) if all(first < last for first, last in zip(begin, end, strict=True)) else None
