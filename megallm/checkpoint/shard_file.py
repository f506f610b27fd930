"""One rank's tensors in one safetensors file: written as a stream, read back by the bytes that are needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.manifest import CHUNK_BYTES, DTYPES, DamagedError, SavedBox, SavedFile, SavedTensor, digest
from megallm.failpoint import passing

# What one write to the file takes.
PIECE_BYTES = 16 * CHUNK_BYTES
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8


def size_of(boxes: Sequence[LocalBox]) -> int:
    """Bytes of the file that `write_shard` makes of the boxes."""
    return len(_header(boxes)) + sum(box.tensor.nbytes for box in boxes)


def write_shard(
    path: Path, boxes: Sequence[LocalBox], number: int, tensors: Iterable[torch.Tensor] | None = None
) -> tuple[SavedFile, dict[str, SavedTensor]]:
    """Write boxes to a new file and flush it to the disk; gives its rows for the manifest, as file `number`.

    What is written are the boxes' tensors, or in their stead `tensors` of the same shapes and types, one after another.

    The checksums are those of the tensors in memory: what a disk or a bus does to the bytes on their way is noticed
    when they are read. Beside the tensors no more memory is taken than the largest box has, where it is not on the CPU.

    Raises:
        OSError: the file cannot be written.
    """
    header = _header(boxes)
    rows: dict[str, SavedTensor] = {}
    begin = len(header)
    with passing("checkpoint.shard.open"):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        _write(descriptor, memoryview(header))
        contents = (box.tensor for box in boxes) if tensors is None else tensors
        for box, tensor in zip(boxes, contents, strict=True):
            wanted = tuple(box.tensor.shape), box.tensor.dtype
            assert (tuple(tensor.shape), tensor.dtype) == wanted, f"{box.key} was declared as {wanted}"
            data = _bytes_of(tensor)
            chunks = tuple(digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES))
            _write(descriptor, data)
            name = f"{box.kind}/{box.name}"
            saved = SavedBox(number, begin, len(data), box.offset, tuple(box.tensor.shape), chunks)
            known = rows.get(name, SavedTensor(_NAMES[box.tensor.dtype], box.global_shape, ()))
            rows[name] = SavedTensor(known.dtype, known.shape, (*known.boxes, saved))
            begin += len(data)
        with passing("checkpoint.shard.fsync"):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return SavedFile(path.name, begin, len(header), digest(header)), rows


def _header(boxes: Sequence[LocalBox]) -> bytes:
    """safetensors: the length of a JSON object, uint64 little-endian, and the object, padded to a multiple of 8."""
    rows, begin = {}, 0
    for box in boxes:
        end = begin + box.tensor.nbytes
        assert box.key not in rows, f"{box.key} is there twice"
        rows[box.key] = {
            "dtype": _NAMES[box.tensor.dtype],
            "shape": list(box.tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _write(descriptor: int, data: memoryview) -> None:
    for at in range(0, len(data), PIECE_BYTES):
        piece = data[at : at + PIECE_BYTES]
        with passing("checkpoint.shard.write"):
            while piece:
                piece = piece[os.write(descriptor, piece) :]


class ShardReader:
    """A rank's file of a checkpoint. Every byte that it gives has been compared with the manifest's checksums.

    Raises:
        DamagedError: the file is missing, is no plain file, or has another size.
    """

    def __init__(self, folder: Path, file: SavedFile) -> None:
        self.path = folder / file.name
        self._file = file
        try:
            # A link could lead anywhere, and a pipe never end.
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise DamagedError(f"{self.path} cannot be opened: {error.strerror}") from None
        size = os.fstat(self._descriptor).st_size
        if size != file.num_bytes:
            os.close(self._descriptor)
            raise DamagedError(f"{self.path} has {size} bytes where {file.num_bytes} were written")

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; nothing is read after that."""
        os.close(self._descriptor)

    def check_header(self) -> None:
        """Raises DamagedError where the bytes before the data are other ones."""
        if digest(self._read(0, self._file.data_begin)) != self._file.header_digest:
            raise DamagedError(f"{self.path} is damaged in its first {self._file.data_begin} bytes, the header")

    def read(self, name: str, box: SavedBox, first: int, last: int) -> memoryview:
        """Bytes `first` to `last - 1` of a box.

        Raises:
            DamagedError: a chunk of CHUNK_BYTES that they touch has another checksum.
        """
        begin = first // CHUNK_BYTES * CHUNK_BYTES
        data = self._read(box.begin + begin, min(-(-last // CHUNK_BYTES) * CHUNK_BYTES, box.num_bytes) - begin)
        for at in range(0, len(data), CHUNK_BYTES):
            number = (begin + at) // CHUNK_BYTES
            if digest(data[at : at + CHUNK_BYTES]) != box.chunks[number]:
                place = box.begin + number * CHUNK_BYTES
                raise DamagedError(
                    f"{self.path} is damaged between bytes {place} and {place + CHUNK_BYTES}, in {name} at {box.offset}"
                )
        return data[first - begin : last - begin]

    def _read(self, begin: int, count: int) -> memoryview:
        data = memoryview(bytearray(count))
        done = 0
        while done < count:
            try:
                got = os.preadv(self._descriptor, [data[done : done + PIECE_BYTES]], begin + done)
            except OSError as error:
                raise DamagedError(f"{self.path} cannot be read at byte {begin + done}: {error.strerror}") from None
            if got == 0:
                raise DamagedError(f"{self.path} ends at byte {begin + done} of {self._file.num_bytes}")
            done += got
        return data
