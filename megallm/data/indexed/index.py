"""An `.idx` file: its header, its three arrays, and the check of every field before anything is used."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, overload

import numpy as np

from megallm.data.indexed.files import InputFile
from megallm.data.indexed.format import CHECK_CHUNK, DTYPES, HEADER, MAGIC, VERSION, file_paths


class Entries(Protocol):
    """What can be measured and cut: an array, or a part of a file."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Section:
    """One array [count] of an index, read from the file where it is cut: `section[start:stop]` is an array.

    Attributes: `dtype`; `offset` of its first entry in the file, in bytes.
    """

    def __init__(self, file: InputFile, dtype: np.dtype, offset: int, count: int) -> None:
        self.dtype, self.offset = dtype, offset
        self._file, self._count = file, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, part: slice) -> np.ndarray: ...
    @overload
    def __getitem__(self, part: int) -> int: ...
    def __getitem__(self, part: slice | int) -> np.ndarray | int:
        if isinstance(part, int):
            return int(self[part : part + 1][0])
        start, stop, step = part.indices(self._count)
        assert step == 1, "a section is read in one direction"
        return self._file.read(self.offset + start * self.dtype.itemsize, max(0, stop - start), self.dtype)


def chunks(entries: Entries, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Entries `start` to `stop - 1` by arrays of bounded size."""
    stop = len(entries) if stop is None else stop
    for first in range(start, stop, CHECK_CHUNK):
        yield entries[first : min(stop, first + CHECK_CHUNK)]


class IndexFile:
    """An opened `.idx` file whose header is checked.

    Attributes: `path`, `bin_path`; `file`, the opened `.idx`; `dtype` of the tokens; `lengths`, `offsets`, `documents`:
    the sections of the file, as `format` describes them.

    Raises:
        ValueError: there is no such file, or a field of the header is not what it must be; names file, byte and field.
    """

    def __init__(self, path_prefix: str | os.PathLike[str]) -> None:
        self.bin_path, self.path = file_paths(path_prefix)
        for path in (self.path, self.bin_path):
            require_file(path, Path(path_prefix))
        self.file = InputFile(self.path)
        try:
            num_sequences, num_entries = self._read_header()
        except ValueError:
            self.file.close()
            raise
        offset = HEADER.size
        self.lengths = Section(self.file, np.dtype("<i4"), offset, num_sequences)
        self.offsets = Section(self.file, np.dtype("<i8"), offset + 4 * num_sequences, num_sequences)
        self.documents = Section(self.file, np.dtype("<i8"), offset + 12 * num_sequences, num_entries)

    def __enter__(self) -> "IndexFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def check(
        self,
        bin_size: int,
        lengths: Entries | None = None,
        offsets: Entries | None = None,
        documents: Entries | None = None,
    ) -> None:
        """Check every entry against the others, and against the size of the `.bin` file in bytes; in bounded memory.

        Lengths are not negative, offsets are their running sum in bytes, whose end is the size of the `.bin`; the
        document array starts with 0, never falls, and ends with the number of sequences.

        Args:
            lengths, offsets, documents: the content of the sections, where it has been read already.

        Raises:
            ValueError: an entry is wrong; names file, byte and field.
        """
        self._check_sequences(
            self.lengths if lengths is None else lengths, self.offsets if offsets is None else offsets, bin_size
        )
        self._check_documents(self.documents if documents is None else documents)

    def refusal(self, field: str, at: int, got: object, want: object) -> ValueError:
        """The error for a field, whose first byte stands at byte `at` of the file."""
        return ValueError(f"{self.path}: {field} (byte {at}) is {got}, but must be {want}.")

    def _read_header(self) -> tuple[int, int]:
        """Check the header; return the numbers of sequences and of document entries, which fit the size of the file."""
        size = self.file.size
        if size < HEADER.size:
            want = f"{HEADER.size} at least, the size of a header"
            raise ValueError(f"{self.path}: the size of the file is {size} bytes, but must be {want}.")
        header = self.file.read(0, HEADER.size, np.dtype("u1")).tobytes()
        magic, version, code, num_sequences, num_entries = HEADER.unpack(header)
        if magic != MAGIC:
            raise self.refusal("the magic", 0, repr(magic), f"{MAGIC!r}: this is no index of a token file")
        if version != VERSION:
            raise self.refusal("the version", 9, version, VERSION)
        if code not in DTYPES:
            known = ", ".join(f"{number} ({dtype.name})" for number, dtype in DTYPES.items() if dtype.kind != "f")
            raise self.refusal("the dtype code", 17, code, f"one of {known}")
        self.dtype = DTYPES[code]
        if self.dtype.kind == "f":
            raise self.refusal("the dtype code", 17, f"{code} ({self.dtype.name})", "one of an integer type")
        if num_entries < 1:
            raise self.refusal("the length of the document array", 26, num_entries, "1 at least")
        want_size = HEADER.size + 12 * num_sequences + 8 * num_entries
        if size != want_size:
            hint = ""
            if num_sequences and size == want_size + num_sequences:
                hint = " (a multimodal dataset, which has one byte more for each sequence, is not supported)"
            raise ValueError(
                f"{self.path}: the size of the file is {size} bytes, but must be {want_size}: {HEADER.size} "
                f"+ 12 x {num_sequences} sequences (the count at byte 18) "
                f"+ 8 x {num_entries} document entries (the count at byte 26){hint}."
            )
        return num_sequences, num_entries

    def _check_sequences(self, lengths: Entries, offsets: Entries, bin_size: int) -> None:
        itemsize = self.dtype.itemsize
        first = end = 0
        for length_part, offset_part in zip(chunks(lengths), chunks(offsets), strict=True):
            if length_part.min() < 0:
                wrong = int(np.argmax(length_part < 0))
                at = self.lengths.offset + 4 * (first + wrong)
                raise self.refusal(f"the length of sequence {first + wrong}", at, int(length_part[wrong]), "0 at least")
            # [chunk], the end of each sequence and so the start of the next.
            ends = np.cumsum(length_part, dtype=np.int64)
            ends *= itemsize
            ends += end
            if offset_part[0] != end or not np.array_equal(offset_part[1:], ends[:-1]):
                expected = np.concatenate(([end], ends[:-1]))
                wrong = int(np.argmax(offset_part != expected))
                at = self.offsets.offset + 8 * (first + wrong)
                want = f"{int(expected[wrong])}, the end of the sequence before it"
                raise self.refusal(f"the byte offset of sequence {first + wrong}", at, int(offset_part[wrong]), want)
            end = int(ends[-1])
            first += len(length_part)
        if bin_size != end:
            raise ValueError(
                f"{self.bin_path}: the size of the file is {bin_size} bytes, but must be {end}, "
                f"the sum of the lengths of the sequences in {self.path} (from byte {self.lengths.offset} on)."
            )

    def _check_documents(self, documents: Entries) -> None:
        first, before = 0, 0
        for part in chunks(documents):
            if first == 0 and part[0] != 0:
                raise self.refusal("entry 0 of the document array", self.documents.offset, int(part[0]), 0)
            falls = part[1:] < part[:-1]
            if part[0] < before or falls.any():
                wrong = 0 if part[0] < before else int(np.argmax(falls)) + 1
                want = f"{before if wrong == 0 else int(part[wrong - 1])} at least, the entry before it"
                at = self.documents.offset + 8 * (first + wrong)
                raise self.refusal(f"entry {first + wrong} of the document array", at, int(part[wrong]), want)
            before = int(part[-1])
            first += len(part)
        if before != len(self.lengths):
            want = f"{len(self.lengths)}, the number of sequences"
            at = self.documents.offset + 8 * (first - 1)
            raise self.refusal("the last entry of the document array", at, before, want)


def require_file(path: Path, prefix: Path) -> None:
    """Raise ValueError where there is no file `path`, a file of the dataset `prefix`, with what lies there instead."""
    if path.exists():
        return
    if prefix.suffix in (".bin", ".idx") and prefix.exists():
        raise ValueError(
            f"{prefix} is a file of a dataset; give the path without its ending: {prefix.with_suffix('')}."
        )
    folder = prefix if prefix.is_dir() else path.parent
    if not folder.is_dir():
        raise ValueError(f"{path} does not exist: there is no folder {folder}.")
    ending = path.name[-4:]
    beside = sorted(str(other)[:-4] for other in folder.glob("*" + ending))
    found = f"in that folder lie {', '.join(beside[:5])}" if beside else f"there is no {ending} file in that folder"
    if folder == prefix:
        raise ValueError(f"{prefix} is a folder: give the path of a dataset without .bin or .idx; {found}.")
    raise ValueError(f"{path} does not exist: give the path of a dataset without .bin or .idx; {found}.")
