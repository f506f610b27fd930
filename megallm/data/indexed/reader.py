"""Reader of Megatron's `.bin`/`.idx` token files: every field is checked before it is used."""

import os
from pathlib import Path

import numpy as np

from megallm.data.indexed.format import CHECK_CHUNK, DTYPES, HEADER, MAGIC, VERSION, file_paths


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
