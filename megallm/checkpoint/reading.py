"""A checkpoint as logical tensors: any box of any of them, whichever files hold it, without a process group."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch

from megallm.checkpoint.boxes import WEIGHTS
from megallm.checkpoint.manifest import (
    DTYPES,
    DamagedError,
    Manifest,
    SavedBox,
    SavedTensor,
    read_manifest,
)
from megallm.checkpoint.shard_file import ShardReader

# What one step of copying reads, rounded up to whole rows of a tensor.
SLAB_BYTES = 2**26
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

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
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

    @torch.no_grad()
    def fill(self, kind: str, name: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Fills `tensor` with the box of its shape that begins at `offset`; converts where the types differ.

        Raises:
            DamagedError: something of it is not as it was written.
            ValueError: there is no tensor of that name.
        """
        saved = self.saved(kind, name)
        filled = 0
        for source in saved.boxes:
            common = _overlap(source, offset, tuple(tensor.shape))
            if common is not None:
                self._copy(f"{kind}/{name}", saved, source, offset, tensor, *common)
                filled += math.prod(b - a for a, b in zip(*common, strict=True))
        if filled != tensor.numel():
            raise DamagedError(
                f"{self.folder} holds {filled} of {tensor.numel()} elements of {kind}/{name} at {offset}"
            )

    def _copy(
        self,
        name: str,
        saved: SavedTensor,
        source: SavedBox,
        offset: tuple[int, ...],
        tensor: torch.Tensor,
        begin: tuple[int, ...],
        end: tuple[int, ...],
    ) -> None:
        """Copies what lies between two corners from a saved box to `tensor`, some rows at a time."""
        reader = self._reader(source.file)
        row_bytes = source.num_bytes // source.shape[0]
        step = max(1, SLAB_BYTES // row_bytes)
        there = tuple(slice(a - o, b - o) for a, b, o in zip(begin[1:], end[1:], source.offset[1:], strict=True))
        here = tuple(slice(a - o, b - o) for a, b, o in zip(begin[1:], end[1:], offset[1:], strict=True))
        for first in range(begin[0], end[0], step):
            last = min(first + step, end[0])
            row = first - source.offset[0]
            data = reader.read(name, source, row * row_bytes, (last - source.offset[0]) * row_bytes)
            # [rows, ...], as the source has them
            values = torch.frombuffer(data, dtype=DTYPES[saved.dtype]).view(last - first, *source.shape[1:])
            tensor[(slice(first - offset[0], last - offset[0]), *here)].copy_(values[(slice(None), *there)])

    def _reader(self, number: int) -> ShardReader:
        if number in self._readers:
            self._readers.move_to_end(number)
        else:
            if len(self._readers) == _MOST_OPEN:
                self._readers.popitem(last=False)[1].close()
            self._readers[number] = ShardReader(self.folder, self.manifest.files[number])
        return self._readers[number]


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
