"""Writer of Megatron's `.bin`/`.idx` token files, byte for byte: a dataset is whole or absent."""

import os
from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megallm.data.indexed.format import CHECK_CHUNK, HEADER, MAGIC, VERSION, dtype_code
from megallm.data.indexed.output import DatasetOutput


class IndexedDatasetWriter:
    """Writes a dataset beside its place and moves it there when it is whole.

    Used as a context manager: leaving the block normally commits both files, an exception removes what was written.
    Memory: 4 bytes for each sequence and 8 for each document.

    Raises:
        ValueError: the folder cannot be written; or (from any method) the disk is full, or tokens do not fit the dtype.
    """

    def __init__(self, path_prefix: str | os.PathLike[str], dtype: np.dtype) -> None:
        self.dtype, self._code = np.dtype(dtype), dtype_code(dtype)
        self._output = DatasetOutput(path_prefix)
        self._sequence_lengths = array("i")
        self._document_indices = array("q", [0])
        self._finished = False
        self.num_tokens = 0

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    def add_document(self, tokens: Sequence[int] | np.ndarray, sequence_lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: [n] integers, the sequences of the document one after another.
            sequence_lengths: tokens of each sequence, n in sum; without it the document is one sequence, or none when
                n is 0.

        Raises:
            ValueError: a token is outside the range of the dtype, or the lengths do not sum to n.
        """
        if sequence_lengths is None:
            sequence_lengths = [len(tokens)] if len(tokens) else []
        self.add_documents(tokens, sequence_lengths, [len(sequence_lengths)])

    def add_documents(
        self,
        tokens: Sequence[int] | np.ndarray,
        sequence_lengths: Sequence[int] | np.ndarray,
        sequences_per_document: Sequence[int] | np.ndarray,
    ) -> None:
        """Append many documents at once.

        Args:
            tokens: [n] integers, all sequences of all documents one after another.
            sequence_lengths: [sequences] tokens of each sequence, n in sum.
            sequences_per_document: [documents] sequences of each document, the length of `sequence_lengths` in sum; 0
                for a document without tokens.

        Raises:
            ValueError: a token is outside the range of the dtype, a sequence is longer than the format can say, or the
                sums do not fit; nothing of these documents is written then.
        """
        values = np.asarray(tokens)
        lengths = np.asarray(sequence_lengths, np.int64)
        sequences = np.asarray(sequences_per_document, np.int64)
        if lengths.min(initial=0) < 0 or lengths.sum() != len(values):
            raise ValueError(f"Documents of {len(values)} tokens cannot have sequences of {lengths.sum()} in sum.")
        if sequences.min(initial=0) < 0 or sequences.sum() != len(lengths):
            raise ValueError(f"Documents of {sequences.sum()} sequences cannot have {len(lengths)} sequence lengths.")
        longest = lengths.max(initial=0)
        if longest > np.iinfo(np.int32).max:
            raise ValueError(
                f"A sequence of {longest} tokens is longer than the {np.iinfo(np.int32).max} that an index can say."
            )
        self._check_range(values, lengths, sequences)
        with self._output.writing():
            self._output.bin.write(np.ascontiguousarray(values, self.dtype).data)
        ends = len(self._sequence_lengths) + np.cumsum(sequences)
        self._sequence_lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._document_indices.frombytes(ends.tobytes())
        self.num_tokens += len(values)

    def finish(self) -> None:
        """Write what is left to write, so that only the move remains: nothing can be added any more."""
        with self._output.writing():
            self._write_index(self._output.idx)
        self._output.finish()
        self._finished = True

    def commit(self) -> None:
        """Finish both files and move them to their places; an index is never seen beside tokens of another."""
        if not self._finished:
            self.finish()
        self._output.commit()

    def discard(self) -> None:
        """Remove what was written."""
        self._output.discard()

    def _check_range(self, values: np.ndarray, lengths: np.ndarray, sequences: np.ndarray) -> None:
        if values.size == 0:
            return
        if values.dtype.kind not in "iu":
            raise ValueError(f"Tokens must be integers, not {values.dtype}.")
        if np.can_cast(values.dtype, self.dtype, "safe"):
            return
        limits = np.iinfo(self.dtype)
        if int(values.min()) >= limits.min and int(values.max()) <= limits.max:
            return
        wrong = int(np.argmax((values < limits.min) | (values > limits.max)))
        # [documents], the number of the first token after each document.
        ends = np.concatenate(([0], np.cumsum(lengths)))[np.cumsum(sequences)]
        document = self.num_documents + int(np.searchsorted(ends, wrong, side="right"))
        raise ValueError(
            f"Token {int(values[wrong])} does not fit {self.dtype.name}: {limits.min} to {limits.max}; "
            f"it stands in document {document}, the first being 0."
        )

    def _write_index(self, file: BinaryIO) -> None:
        lengths = np.frombuffer(self._sequence_lengths, np.int32)
        file.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(self._document_indices)))
        file.write(lengths.astype("<i4", copy=False).data)
        end = 0
        for start in range(0, len(lengths), CHECK_CHUNK):
            part = lengths[start : start + CHECK_CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(part)
            file.write((ends - part).astype("<i8", copy=False).data)
            end = int(ends[-1])
        file.write(np.frombuffer(self._document_indices, np.int64).astype("<i8", copy=False).data)
