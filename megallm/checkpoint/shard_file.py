"""One rank's tensors in one safetensors file: written as a stream, read back by the bytes that are needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.manifest import CHUNK_BYTES, DTYPES, DamagedError, SavedBox, SavedFile, SavedTensor, digest
from megallm.failpoint import passing

# What one write to the file takes, and one read.
PIECE_BYTES = 16 * CHUNK_BYTES
# After so much the disk is set to work: by itself the system may wait until all is written.
_FLUSHED_BYTES = 64 * CHUNK_BYTES
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
    with _ShardWriter(path) as writer:
        writer.write(memoryview(header))
        contents = (box.tensor for box in boxes) if tensors is None else tensors
        for box, tensor in zip(boxes, contents, strict=True):
            wanted = tuple(box.tensor.shape), box.tensor.dtype
            assert (tuple(tensor.shape), tensor.dtype) == wanted, f"{box.key} was declared as {wanted}"
            begin, data = writer.num_bytes, bytes_of(tensor)
            chunks = tuple(writer.write(data))
            name = f"{box.kind}/{box.name}"
            saved = SavedBox(number, begin, len(data), box.offset, tuple(box.tensor.shape), chunks)
            known = rows.get(name, SavedTensor(_NAMES[box.tensor.dtype], box.global_shape, ()))
            rows[name] = SavedTensor(known.dtype, known.shape, (*known.boxes, saved))
        with passing("checkpoint.shard.fsync"):
            writer.flush()
    return SavedFile(path.name, writer.num_bytes, len(header), digest(header)), rows


class _ShardWriter:
    """A new file, which is written from its beginning on. Attribute `num_bytes`: what was written so far.

    The disk works in the background on what was written, while the rest is still being read and hashed: it is then
    the disk alone that a large file takes its time from.
    """

    def __init__(self, path: Path) -> None:
        with passing("checkpoint.shard.open"):
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self.num_bytes = 0
        self._begun_flushing = 0
        # One flushes, one hashes; this one writes.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="checkpoint")
        self._flushing: Future[None] | None = None

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True)
        os.close(self._descriptor)

    def write(self, data: memoryview) -> list[str]:
        """Appends bytes; gives the digest of each CHUNK_BYTES of them."""
        hashing = self._threads.submit(digests, data) if len(data) > PIECE_BYTES else None
        for at in range(0, len(data), PIECE_BYTES):
            piece = rest = data[at : at + PIECE_BYTES]
            with passing("checkpoint.shard.write"):
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            self.num_bytes += len(piece)
            self._flush_in_background()
        return digests(data) if hashing is None else hashing.result()

    def flush(self) -> None:
        """Returns when all is on the disk. Raises OSError, also for what went wrong in the background."""
        if self._flushing is not None:
            self._flushing.result()
        os.fsync(self._descriptor)

    def _flush_in_background(self) -> None:
        if self.num_bytes - self._begun_flushing < _FLUSHED_BYTES:
            return
        if self._flushing is not None:
            if not self._flushing.done():
                return
            # The system tells of an error once.
            self._flushing.result()
        self._begun_flushing = self.num_bytes
        self._flushing = self._threads.submit(os.fsync, self._descriptor)


def digests(data: memoryview) -> list[str]:
    """The digest of each CHUNK_BYTES; the last chunk may be shorter."""
    return [digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]


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


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in C order: its own memory where it is contiguous and on the CPU, else a copy of it."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


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
        # By pieces: how much it is, the manifest says, which anybody may have written.
        state, end = xxhash.xxh3_64(), self._file.data_begin
        piece = memoryview(bytearray(min(end, CHUNK_BYTES)))
        for at in range(0, end, CHUNK_BYTES):
            part = piece[: end - at]
            self._read(at, part)
            state.update(part)
        if state.hexdigest() != self._file.header_digest:
            raise DamagedError(f"{self.path} is damaged in its first {end} bytes, the header")

    def read(self, name: str, box: SavedBox, first: int, into: memoryview) -> None:
        """Fills `into` with whole chunks of a box: from byte `first` on, which begins one, to where another ends.

        Raises:
            DamagedError: a chunk has another checksum.
        """
        number, last = first // CHUNK_BYTES, first + len(into)
        assert first % CHUNK_BYTES == 0 and (last % CHUNK_BYTES == 0 or last == box.num_bytes), "chunks are read whole"
        self._read(box.begin + first, into)
        for found in digests(into):
            if found != box.chunks[number]:
                place = box.begin + number * CHUNK_BYTES
                end = min(place + CHUNK_BYTES, box.begin + box.num_bytes)
                raise DamagedError(f"{self.path} is damaged between bytes {place} and {end}, in {name} at {box.offset}")
            number += 1

    def _read(self, begin: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self._descriptor, [into[done : done + PIECE_BYTES]], begin + done)
            except OSError as error:
                raise DamagedError(f"{self.path} cannot be read at byte {begin + done}: {error.strerror}") from None
            if got == 0:
                raise DamagedError(f"{self.path} ends at byte {begin + done} of {self._file.num_bytes}")
            done += got


def whole_chunks(first: int, last: int, num_bytes: int) -> tuple[int, int]:
    """The chunks that bytes `first` to `last - 1` of a box lie in: the first byte, and the one behind the last."""
    return first // CHUNK_BYTES * CHUNK_BYTES, min(-(-last // CHUNK_BYTES) * CHUNK_BYTES, num_bytes)
