"""One rank's tensors in one safetensors file: written as a stream, read back by the bytes that are needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.manifest import CHUNK_BYTES, DamagedError, SavedBox, SavedFile, SavedTensor, digest
from megallm.checkpoint.stream import DTYPE_NAMES, PIECE_BYTES, Flushing, safetensors_header
from megallm.failpoint import passing


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
    Nothing is kept of one of `tensors` when the next is asked for.

    Raises:
        OSError: the file cannot be written.
    """
    header = _header(boxes)
    rows: dict[str, SavedTensor] = {}
    with _ShardWriter(path) as writer:
        writer.write(memoryview(header))
        left = iter(boxes)
        for tensor in (box.tensor for box in boxes) if tensors is None else tensors:
            box = next(left)
            wanted = tuple(box.tensor.shape), box.tensor.dtype
            assert (tuple(tensor.shape), tensor.dtype) == wanted, f"{box.key} was declared as {wanted}"
            begin, num_bytes = writer.num_bytes, tensor.nbytes
            chunks = tuple(writer.write(bytes_of(tensor)))
            del tensor
            name = f"{box.kind}/{box.name}"
            saved = SavedBox(number, begin, num_bytes, box.offset, tuple(box.tensor.shape), chunks)
            known = rows.get(name, SavedTensor(DTYPE_NAMES[box.tensor.dtype], box.global_shape, ()))
            rows[name] = SavedTensor(known.dtype, known.shape, (*known.boxes, saved))
        assert next(left, None) is None, "there are fewer tensors than boxes"
        with passing("checkpoint.shard.fsync"):
            writer.flush()
    return SavedFile(path.name, writer.num_bytes, len(header), digest(header)), rows


class _ShardWriter:
    """A new file, which is written from its beginning on. Attribute `num_bytes`: what was written so far."""

    def __init__(self, path: Path) -> None:
        with passing("checkpoint.shard.open"):
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self.num_bytes = 0
        self._flushing = Flushing(self._descriptor)
        # It hashes, while this one writes.
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._hashing.shutdown(wait=True)
        self._flushing.__exit__(*error)
        os.close(self._descriptor)

    def write(self, data: memoryview) -> list[str]:
        """Appends bytes; gives the digest of each CHUNK_BYTES of them."""
        hashing = self._hashing.submit(digests, data) if len(data) > PIECE_BYTES else None
        for at in range(0, len(data), PIECE_BYTES):
            piece = rest = data[at : at + PIECE_BYTES]
            with passing("checkpoint.shard.write"):
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            self.num_bytes += len(piece)
            self._flushing.wrote(len(piece))
        return digests(data) if hashing is None else hashing.result()

    def flush(self) -> None:
        """Returns when all is on the disk. Raises OSError, also for what went wrong in the background."""
        self._flushing.finish()


def digests(data: memoryview) -> list[str]:
    """The digest of each CHUNK_BYTES; the last chunk may be shorter."""
    return [digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]


def _header(boxes: Sequence[LocalBox]) -> bytes:
    return safetensors_header((box.key, box.tensor.dtype, tuple(box.tensor.shape), box.tensor.nbytes) for box in boxes)


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
