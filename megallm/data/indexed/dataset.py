"""Reader and writer of Megatron's `.bin`/`.idx` token files, byte for byte.

`<prefix>.bin` holds the token arrays back to back, without header or padding. `<prefix>.idx` is little-endian:

    9 bytes   magic "MMIDIDX\\0\\0"
    u64       version, 1
    u8        code of the token dtype
    u64       S, the number of sequences
    u64       D, the length of the document array: documents + 1
    int32[S]  tokens of each sequence
    int64[S]  byte offset of each sequence in the .bin file
    int64[D]  0, then the running count of sequences after each document; the last entry is S
"""

import os
import secrets
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
# Vocabularies of this size and more are stored as int32; the limit lies below 2^16 because Megatron's does.
UINT16_VOCABULARY_LIMIT = 65500
# Entries looked at together while an index is checked: bounds the memory of the check, whatever the size of the index.
CHECK_CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron stores tokens of a vocabulary: uint16 below 65,500 entries, int32 from there on."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY_LIMIT else DTYPES[4]


def file_paths(path_prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The paths of the `.bin` and of the `.idx` file of a dataset."""
    prefix = os.fspath(path_prefix)
    return Path(prefix + ".bin"), Path(prefix + ".idx")


def _file_size(path: Path) -> int:
    """Size of a file in bytes; a sentence when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        parent = path.parent
        if not parent.is_dir():
            raise ValueError(f"{path} does not exist: there is no folder {parent}.") from None
        beside = sorted(str(parent / other.stem) for other in parent.glob("*" + path.suffix))
        found = (
            f"in that folder lie {', '.join(beside[:5])}"
            if beside
            else f"there is no {path.suffix} file in that folder"
        )
        raise ValueError(f"{path} does not exist: give the path without .bin or .idx; {found}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def _map(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """A read-only array [count] over a part of a file. An empty part is not mapped: the system refuses that."""
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


class IndexedDataset:
    """Memory-mapped, read-only sequences of tokens, grouped into documents.

    Attributes: `path_prefix`; `dtype` of the tokens; `sequence_lengths` int32 [sequences], in tokens;
    `sequence_offsets` int64 [sequences], in bytes; `document_indices` int64 [documents + 1], first sequence of each
    document; `num_tokens`.

    Every field of the index is checked against the others and against the size of the `.bin` file when the dataset is
    opened: one pass over the index, in bounded memory.

    Raises:
        ValueError: a file is missing, or a field is not what it must be; names file, field, value and expectation.
    """

    def __init__(self, path_prefix: str | os.PathLike[str]) -> None:
        self.path_prefix = os.fspath(path_prefix)
        self._bin_path, self._idx_path = file_paths(path_prefix)
        idx_size, bin_size = _file_size(self._idx_path), _file_size(self._bin_path)
        num_sequences, num_entries = self._read_header(idx_size)
        offset = HEADER.size
        self.sequence_lengths = _map(self._idx_path, np.dtype("<i4"), offset, num_sequences)
        offset += 4 * num_sequences
        self.sequence_offsets = _map(self._idx_path, np.dtype("<i8"), offset, num_sequences)
        offset += 8 * num_sequences
        self.document_indices = _map(self._idx_path, np.dtype("<i8"), offset, num_entries)
        self._check_sequences(bin_size)
        self._check_documents()
        self.num_tokens = bin_size // self.dtype.itemsize
        self._tokens = _map(self._bin_path, self.dtype, 0, self.num_tokens)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of one sequence, as a read-only view."""
        return self.get(index)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        # A worker that is not forked opens the files again; a copy of a mapped array would carry all its content.
        return IndexedDataset, (self.path_prefix,)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [length] of sequence `index` from token `offset` on (without `length` to its end), a read-only view.

        Raises:
            IndexError: there is no such sequence, or the range lies outside of it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path_prefix} has sequences 0 to {len(self) - 1}, not {index}.")
        available = int(self.sequence_lengths[index])
        if length is None:
            length = available - offset
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(
                f"sequence {index} of {self.path_prefix} has {available} tokens, not {offset} to {offset + length}."
            )
        start = int(self.sequence_offsets[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    def _refuse(self, field: str, got: object, want: object) -> ValueError:
        return ValueError(f"{self._idx_path}: {field} is {got}, but must be {want}.")

    def _read_header(self, idx_size: int) -> tuple[int, int]:
        """Check the header; return the numbers of sequences and of document entries, which fit the size of the file."""
        if idx_size < HEADER.size:
            raise self._refuse(
                "the size of the file", f"{idx_size} bytes", f"{HEADER.size} at least, the size of a header"
            )
        with open(self._idx_path, "rb") as file:
            magic, version, code, num_sequences, num_entries = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise self._refuse("the magic", repr(magic), f"{MAGIC!r}: this is no index of a token file")
        if version != VERSION:
            raise self._refuse("the version", version, VERSION)
        if code not in DTYPES:
            known = ", ".join(f"{number} ({dtype.name})" for number, dtype in DTYPES.items())
            raise self._refuse("the dtype code", code, f"one of {known}")
        self.dtype = DTYPES[code]
        if self.dtype.kind == "f":
            raise self._refuse("the dtype", self.dtype.name, "an integer type, since tokens are integers")
        if num_entries < 1:
            raise self._refuse("the length of the document array", num_entries, "1 at least")
        want = HEADER.size + 12 * num_sequences + 8 * num_entries
        if idx_size != want:
            raise self._refuse(
                "the size of the file",
                f"{idx_size} bytes",
                f"{want} ({HEADER.size} + 12 x {num_sequences} sequences + 8 x {num_entries} document entries)",
            )
        return num_sequences, num_entries

    def _check_sequences(self, bin_size: int) -> None:
        """Lengths are not negative, offsets are their running sum in bytes, the last end is the size of the .bin."""
        end = 0
        for start in range(0, len(self), CHECK_CHUNK):
            lengths = np.asarray(self.sequence_lengths[start : start + CHECK_CHUNK], np.int64)
            offsets = self.sequence_offsets[start : start + CHECK_CHUNK]
            if lengths.min() < 0:
                wrong = int(np.argmax(lengths < 0))
                raise self._refuse(f"the length of sequence {start + wrong}", int(lengths[wrong]), "0 at least")
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            expected = ends - lengths * self.dtype.itemsize
            if not np.array_equal(offsets, expected):
                wrong = int(np.argmax(offsets != expected))
                want = f"{int(expected[wrong])}, the end of the sequence before it"
                raise self._refuse(f"the byte offset of sequence {start + wrong}", int(offsets[wrong]), want)
            end = int(ends[-1])
        if bin_size != end:
            raise ValueError(
                f"{self._bin_path}: the size of the file is {bin_size} bytes, but must be {end}, "
                f"the sum of the sequences in {self._idx_path}."
            )

    def _check_documents(self) -> None:
        """The document array starts with 0, never falls, and ends with the number of sequences."""
        indices = self.document_indices
        if indices[0] != 0:
            raise self._refuse("entry 0 of the document array", int(indices[0]), 0)
        for start in range(0, len(indices), CHECK_CHUNK):
            part = indices[start : start + CHECK_CHUNK + 1]
            falls = part[1:] < part[:-1]
            if falls.any():
                wrong = int(np.argmax(falls)) + 1
                want = f"{int(part[wrong - 1])} at least, the entry before it"
                raise self._refuse(f"entry {start + wrong} of the document array", int(part[wrong]), want)
        if indices[-1] != len(self):
            want = f"{len(self)}, the number of sequences"
            raise self._refuse("the last entry of the document array", int(indices[-1]), want)


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
