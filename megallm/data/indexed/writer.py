"""Writer of Megatron's `.bin`/`.idx` token files, byte for byte: a dataset is whole or absent."""

import os
import secrets
from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megallm.data.indexed.format import CHECK_CHUNK, DTYPES, HEADER, MAGIC, VERSION, file_paths


class IndexedDatasetWriter:
    """Writes a dataset beside its place and moves it there when it is whole.

    Used as a context manager: leaving the block normally commits both files, an exception removes what was written.
    Memory: 4 bytes for each sequence and 8 for each document.

    Raises:
        ValueError: the folder cannot be written, or (from `add_document`) tokens do not fit the dtype.
    """

    def __init__(self, path_prefix: str | os.PathLike[str], dtype: np.dtype) -> None:
        codes = [code for code, known in DTYPES.items() if known == dtype and known.kind != "f"]
        assert codes, f"{dtype} is not a dtype that tokens are stored in"
        self.dtype, self._code = np.dtype(dtype), codes[0]
        self._bin_path, self._idx_path = file_paths(path_prefix)
        # Two jobs that write the same dataset at the same time do not mix: the later commit stays.
        suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        self._bin_temporary = self._bin_path.with_name(self._bin_path.name + suffix)
        self._idx_temporary = self._idx_path.with_name(self._idx_path.name + suffix)
        self._sequence_lengths = array("i")
        self._document_indices = array("q", [0])
        self.num_tokens = 0
        try:
            self._bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(self._bin_temporary, "xb")  # noqa: SIM115  (closed by commit or discard)
        except OSError as error:
            raise ValueError(f"{self._bin_path} cannot be written: {error.strerror}.") from None

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def add_document(self, tokens: Sequence[int] | np.ndarray, sequence_lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: [n] integers, the sequences of the document one after another.
            sequence_lengths: tokens of each sequence, n in sum; without it the document is one sequence, or none when
                n is 0.

        Raises:
            ValueError: a token is outside the range of the dtype, or the lengths do not sum to n.
        """
        values = np.asarray(tokens)
        if values.size:
            if values.dtype.kind not in "iu":
                raise ValueError(f"Tokens must be integers, not {values.dtype}.")
            limits = np.iinfo(self.dtype)
            low, high = int(values.min()), int(values.max())
            if low < limits.min or high > limits.max:
                wrong = low if low < limits.min else high
                raise ValueError(f"Token {wrong} does not fit {self.dtype.name}: {limits.min} to {limits.max}.")
        if sequence_lengths is None:
            sequence_lengths = [len(values)] if len(values) else []
        if min(sequence_lengths, default=0) < 0 or sum(sequence_lengths) != len(values):
            raise ValueError(f"A document of {len(values)} tokens cannot have sequences of {sum(sequence_lengths)}.")
        self._bin.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self._sequence_lengths.extend(sequence_lengths)
        self._document_indices.append(len(self._sequence_lengths))
        self.num_tokens += len(values)

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    def finish(self) -> None:
        """Write what is left to write, so that only the move remains: nothing can be added any more."""
        self._finish_file(self._bin)
        with open(self._idx_temporary, "xb") as file:
            self._write_index(file)
            self._finish_file(file)

    def commit(self) -> None:
        """Finish both files and move them to their places; an index is never seen beside tokens of another."""
        try:
            if not self._bin.closed:
                self.finish()
            self._idx_path.unlink(missing_ok=True)
            os.replace(self._bin_temporary, self._bin_path)
            os.replace(self._idx_temporary, self._idx_path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what was written."""
        self._bin.close()
        self._bin_temporary.unlink(missing_ok=True)
        self._idx_temporary.unlink(missing_ok=True)

    def _write_index(self, file: BinaryIO) -> None:
        lengths = np.array(self._sequence_lengths, np.dtype("<i4"))
        file.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(self._document_indices)))
        file.write(lengths.tobytes())
        end = 0
        for start in range(0, len(lengths), CHECK_CHUNK):
            part = lengths[start : start + CHECK_CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(part)
            file.write((ends - part).astype("<i8", copy=False).tobytes())
            end = int(ends[-1])
        file.write(np.frombuffer(self._document_indices, np.int64).astype("<i8", copy=False).tobytes())

    @staticmethod
    def _finish_file(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
