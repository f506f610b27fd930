"""The growing files of a dataset in the making, and the index that is made of them at the end, in constant memory."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megallm.data.indexed.format import CHECK_CHUNK, HEADER, MAGIC, VERSION, dtype_code

BUFFER_BYTES = 1 << 20
LENGTH_DTYPE = np.dtype("<i4")


class Parts:
    """Tokens, lengths of sequences, and sequences of documents of one key, each appended to a file of its own.

    Attributes: `tokens_path`, which becomes the `.bin` as it is; `index_path`, where `write_index` puts the `.idx`;
    `record_prefix`, beside which the record waits.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.record_prefix = folder / str(number)
        self.tokens_path = folder / f"{number}.bin"
        self.index_path = folder / f"{number}.idx"
        self._lengths_path = folder / f"{number}.lengths"
        self._sequences_path = folder / f"{number}.sequences"
        self._files: list[BinaryIO] = []

    def open(self, sizes: list[int]) -> None:
        """Go on from the given sizes in bytes: what a killed job wrote beyond them is cut off.

        Raises:
            ValueError: a file is missing or shorter than that.
        """
        for path, size in zip((self.tokens_path, self._lengths_path, self._sequences_path), sizes, strict=True):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            file = os.fdopen(descriptor, "r+b", buffering=BUFFER_BYTES)
            self._files.append(file)
            here = os.fstat(descriptor).st_size
            if here < size:
                raise ValueError(
                    f"{path} has {here:,} bytes, but its journal says {size:,}: it was changed from outside. "
                    "--overwrite starts over."
                )
            os.ftruncate(descriptor, size)
            file.seek(size)

    def append(self, tokens: bytes | memoryview, lengths: bytes | memoryview, sequences: bytes | memoryview) -> None:
        """Add documents: tokens as they stand in a `.bin`, int32 lengths of sequences, int32 sequences of documents."""
        for file, content in zip(self._files, (tokens, lengths, sequences), strict=True):
            file.write(content)

    def sync(self) -> list[int]:
        """Bring everything to the disk; gives the sizes of the files in bytes."""
        for file in self._files:
            file.flush()
            os.fdatasync(file.fileno())
        return [file.tell() for file in self._files]

    def close(self) -> None:
        """Close the files. Bytes that do not fit on the disk any more are given up."""
        for file in self._files:
            with suppress(OSError):
                file.close()
        self._files = []

    def write_index(self, dtype: np.dtype) -> None:
        """Write the `.idx` of what was appended (see `megallm.data.indexed.format`), a block after another."""
        num_sequences = os.path.getsize(self._lengths_path) // LENGTH_DTYPE.itemsize
        num_documents = os.path.getsize(self._sequences_path) // LENGTH_DTYPE.itemsize
        with open(self.index_path, "wb", buffering=BUFFER_BYTES) as file:
            file.write(HEADER.pack(MAGIC, VERSION, dtype_code(dtype), num_sequences, num_documents + 1))
            for lengths in _blocks(self._lengths_path):
                file.write(lengths.data)
            end = 0
            for lengths in _blocks(self._lengths_path):
                ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize + end
                file.write((ends - lengths.astype(np.int64) * dtype.itemsize).astype("<i8", copy=False).data)
                end = int(ends[-1])
            end = 0
            file.write(np.zeros(1, "<i8").data)
            for sequences in _blocks(self._sequences_path):
                ends = np.cumsum(sequences, dtype=np.int64) + end
                file.write(ends.astype("<i8", copy=False).data)
                end = int(ends[-1])
            file.flush()
            os.fsync(file.fileno())

    def index_size(self) -> int:
        """Bytes of the index that `write_index` will write."""
        sequences, documents = (os.path.getsize(path) // 4 for path in (self._lengths_path, self._sequences_path))
        return HEADER.size + 12 * sequences + 8 * (documents + 1)


def _blocks(path: Path) -> Iterator[np.ndarray]:
    """The int32 entries of a file, by arrays of bounded size."""
    with open(path, "rb") as file:
        while True:
            block = np.fromfile(file, LENGTH_DTYPE, CHECK_CHUNK)
            if not block.size:
                return
            yield block
