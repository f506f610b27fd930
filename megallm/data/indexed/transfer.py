"""Documents moved from datasets to a new one, in memory that does not grow with them and at the speed of the disk."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from megallm.data.indexed.files import BLOCK_BYTES, InputFile
from megallm.data.indexed.format import HEADER, MAGIC, VERSION, dtype_code
from megallm.data.indexed.index import IndexFile, chunks
from megallm.data.indexed.output import DatasetOutput

# Errors by which a system says that it cannot copy between these two files by itself.
CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


@dataclass(frozen=True)
class Piece:
    """Some documents of a dataset, one after another.

    Attributes: `path_prefix` and `dtype` of the dataset; `first_document` and `num_documents`; `first_sequence` and
    `num_sequences`; `first_byte` and `num_bytes` of the `.bin`; `index_size`, bytes of the `.idx` that was checked.
    """

    path_prefix: str
    dtype: np.dtype
    first_document: int
    num_documents: int
    first_sequence: int
    num_sequences: int
    first_byte: int
    num_bytes: int
    index_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_bytes // self.dtype.itemsize

    @property
    def num_index_bytes(self) -> int:
        """Bytes of the index that describe these documents."""
        return 12 * self.num_sequences + 8 * self.num_documents


def whole_dataset(path_prefix: str) -> Piece:
    """All documents of a dataset, after a check of every field of its index.

    Raises:
        ValueError: a file is missing, or a field is not what it must be; names file, byte and field.
    """
    with IndexFile(path_prefix) as index, InputFile(index.bin_path) as tokens:
        index.check(tokens.size)
        return Piece(
            path_prefix,
            index.dtype,
            0,
            len(index.documents) - 1,
            0,
            len(index.lengths),
            0,
            tokens.size,
            index.file.size,
        )


def part_of(whole: Piece, first_document: int, num_documents: int) -> Piece:
    """Documents `first_document` and so on of a whole dataset."""
    with _reopened(whole) as index:
        first_sequence = index.documents[first_document]
        end_sequence = index.documents[first_document + num_documents]

        def byte(sequence: int) -> int:
            return whole.num_bytes if sequence == whole.num_sequences else index.offsets[sequence]

        start, end = byte(first_sequence), byte(end_sequence)
    num_sequences = end_sequence - first_sequence
    return Piece(
        whole.path_prefix,
        whole.dtype,
        first_document,
        num_documents,
        first_sequence,
        num_sequences,
        start,
        end - start,
        whole.index_size,
    )


def bytes_of(pieces: Sequence[Piece]) -> int:
    """Size of both files of a dataset made of these pieces."""
    return HEADER.size + 8 + sum(piece.num_bytes + piece.num_index_bytes for piece in pieces)


def write_pieces(output: DatasetOutput, pieces: Sequence[Piece], progress: Callable[[int], None]) -> None:
    """Write a dataset of the documents of all pieces, in their order, and finish its files; the caller commits.

    The bytes are those of a writer to which the documents are added one after another, so also those of Megatron's own
    merge. Memory: a few arrays of 8 MiB.

    Args:
        output: where to write.
        pieces: one at least, all of one dtype.
        progress: called with the number of bytes written since the last call.

    Raises:
        ValueError: a dataset changed meanwhile, cannot be read, or the disk is full; nothing is left behind then.
    """
    output.require(bytes_of(pieces))
    with output.writing(bytes_of(pieces)):
        for piece in pieces:
            with IndexFile(piece.path_prefix) as index, InputFile(index.bin_path) as tokens:
                copy_range(tokens, piece.first_byte, piece.num_bytes, output.bin, progress)
        _write_index(output.idx, pieces, progress)
    output.finish()


def _write_index(file: BinaryIO, pieces: Sequence[Piece], progress: Callable[[int], None]) -> None:
    num_sequences = sum(piece.num_sequences for piece in pieces)
    num_documents = sum(piece.num_documents for piece in pieces)
    file.write(HEADER.pack(MAGIC, VERSION, dtype_code(pieces[0].dtype), num_sequences, num_documents + 1))
    for piece in pieces:
        with _reopened(piece) as index:
            start = index.lengths.offset + 4 * piece.first_sequence
            copy_range(index.file, start, 4 * piece.num_sequences, file, progress)
    moved = 0
    for piece in pieces:
        with _reopened(piece) as index:
            stop = piece.first_sequence + piece.num_sequences
            _write_shifted(file, chunks(index.offsets, piece.first_sequence, stop), moved - piece.first_byte, progress)
        moved += piece.num_bytes
    file.write(np.zeros(1, "<i8").data)
    sequences = 0
    for piece in pieces:
        with _reopened(piece) as index:
            # Entry d + 1 is the end of document d.
            first = piece.first_document + 1
            ends = chunks(index.documents, first, first + piece.num_documents)
            _write_shifted(file, ends, sequences - piece.first_sequence, progress)
        sequences += piece.num_sequences


def _write_shifted(file: BinaryIO, parts: Iterator[np.ndarray], shift: int, progress: Callable[[int], None]) -> None:
    for part in parts:
        part += shift
        file.write(part.data)
        progress(part.nbytes)


@contextmanager
def _reopened(piece: Piece) -> Iterator[IndexFile]:
    """The index of a piece once more: merging thousands of datasets must not hold thousands of files open."""
    with IndexFile(piece.path_prefix) as index:
        if index.file.size != piece.index_size or index.dtype != piece.dtype:
            raise ValueError(f"{index.path} changed while it was in use; start again.")
        yield index


def copy_range(source: InputFile, offset: int, count: int, target: BinaryIO, progress: Callable[[int], None]) -> None:
    """Append bytes [offset, offset + count) of a file to another; by the system itself where it can.

    Raises:
        ValueError: the source ends earlier, or cannot be read.
        OSError: the target cannot be written.
    """
    target.flush()
    by_system = hasattr(os, "copy_file_range")
    while count:
        step = min(count, BLOCK_BYTES)
        if by_system:
            try:
                step = os.copy_file_range(source.descriptor, target.fileno(), step, offset)
            except OSError as error:
                if error.errno not in CANNOT_COPY:
                    raise
                step = 0
            # Some file systems say 0 instead of an error; a file that has shrunk is found by reading it.
            by_system = step > 0
            if not by_system:
                continue
        else:
            target.write(source.read(offset, step, np.dtype("u1")).data)
        offset, count = offset + step, count - step
        progress(step)
    # What the system wrote is past what the buffered file knows of.
    target.seek(0, os.SEEK_END)
