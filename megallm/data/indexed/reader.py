"""Reader of Megatron's `.bin`/`.idx` token files: memory-mapped or by plain reads, checked before anything is used."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megallm.data.indexed.files import BLOCK_BYTES, InputFile
from megallm.data.indexed.index import IndexFile


@dataclass(frozen=True)
class CheckedFiles:
    """The files of a dataset whose index was found sound, and their states at that time.

    Attributes: `path_prefix` and `mmap` as of `IndexedDataset`; `states`, size in bytes and time of the last change in
    nanoseconds, of the `.idx` and of the `.bin` file.
    """

    path_prefix: str
    mmap: bool
    states: tuple[tuple[int, int], tuple[int, int]]

    def open(self) -> "IndexedDataset":
        """The dataset once more, without the pass over its index.

        Raises:
            ValueError: a file has changed since, or cannot be read.
        """
        return IndexedDataset(self.path_prefix, self.mmap, self)


class IndexedDataset:
    """Read-only sequences of tokens, grouped into documents.

    Attributes: `path_prefix`, `bin_path`; `dtype` of the tokens; `sequence_lengths` int32 [sequences], in tokens;
    `sequence_offsets` int64 [sequences], in bytes; `document_indices` int64 [documents + 1], first sequence of each
    document; `num_tokens`; `file_descriptor` of the `.bin` file, which stays open for reading; `mapped` [num_tokens],
    all tokens, or None where files are not memory-mapped; `checked_files`, to open them again.

    Every field of the index is checked against the others and against the size of the `.bin` file when the dataset is
    opened: one pass over the index, in bounded memory.

    Args:
        path_prefix: path of both files without `.bin` or `.idx`.
        mmap: map both files into memory, shared by all processes of a machine. Otherwise the index is read into memory
            (20 bytes a sequence at most) and tokens are read at each request, as mounts of object stores want it.
        checked: these files, from an earlier opening: they are not checked again, but must not have changed.

    Raises:
        ValueError: a file is missing, or a field is not what it must be; names file, field, byte, value, expectation.
    """

    def __init__(
        self, path_prefix: str | os.PathLike[str], mmap: bool = True, checked: CheckedFiles | None = None
    ) -> None:
        self.path_prefix = os.fspath(path_prefix)
        self._mmap = mmap
        index = IndexFile(path_prefix)
        self._idx, self._bin = index.file, InputFile(index.bin_path)
        self.bin_path, self.file_descriptor, self.dtype = index.bin_path, self._bin.descriptor, index.dtype
        self.idx_path, self.idx_status = index.file.path, index.file.status
        if checked is not None:
            self._require_unchanged(checked)
        sections = (index.lengths, index.offsets, index.documents)
        if mmap:
            if checked is None:
                index.check(self._bin.size)
            content = self._idx.map()
            arrays = [np.frombuffer(content, part.dtype, len(part), part.offset) for part in sections]
        else:
            arrays = [part[:] for part in sections]
            self._idx.close()
            if checked is None:
                index.check(self._bin.size, *arrays)
        self.sequence_lengths, self.sequence_offsets, self.document_indices = arrays
        self.num_tokens = self._bin.size // self.dtype.itemsize
        self.checked_files = CheckedFiles(self.path_prefix, mmap, (_state(self._idx), _state(self._bin)))

    @cached_property
    def mapped(self) -> np.ndarray | None:
        # Not before it is asked for: the maps of a process are limited, and samples are read without.
        return np.frombuffer(self._bin.map(), self.dtype) if self._mmap else None

    def _require_unchanged(self, checked: CheckedFiles) -> None:
        for file, state in zip((self._idx, self._bin), checked.states, strict=True):
            if _state(file) != state:
                how = (
                    "it was written anew"
                    if file.size == state[0]
                    else f"it had {state[0]} bytes, and has {file.size} now"
                )
                raise ValueError(f"{file.path} changed while it was in use: {how}.")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of one sequence, as a read-only array."""
        return self.get(index)

    def __reduce__(self) -> tuple[type, tuple[str, bool]]:
        # A worker that is not forked opens the files again; a copy of a mapped array would carry all its content.
        return IndexedDataset, (self.path_prefix, self._mmap)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def check_size(self) -> None:
        """Raise ValueError when a mapped file has become shorter than it was at opening.

        Touching a page that a mapped file has lost ends the process with SIGBUS; this is asked before each touch. Plain
        reads need no asking: they end early and say the same.
        """
        self._bin.check_size()
        if self._mmap:
            self._idx.check_size()

    def sizes_at_opening(self) -> list[tuple[int, int]]:
        """Descriptors and sizes in bytes of the files that `check_size` looks at."""
        files = [self._bin, self._idx] if self._mmap else [self._bin]
        return [(file.descriptor, file.size) for file in files]

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [length] of sequence `index` from token `offset` on (without `length` to its end), read-only.

        Raises:
            IndexError: there is no such sequence, or the range lies outside of it.
            ValueError: the file has shrunk since it was opened, or cannot be read.
        """
        if self._mmap:
            self.check_size()
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
        return self.tokens(start, start + length)

    def document_range(self, document: int) -> tuple[int, int]:
        """Numbers of the first token of a document, and of the token after its last, in the whole `.bin` file."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"{self.path_prefix} has documents 0 to {self.num_documents - 1}, not {document}.")
        start, end = self.token_starts(self.document_indices[document : document + 2])
        return int(start), int(end)

    def token_starts(self, sequences: np.ndarray) -> np.ndarray:
        """Number of the first token of each sequence, int64; `len(self)` stands for the end of the file."""
        starts = np.full(len(sequences), self.num_tokens, np.int64)
        inside = sequences < len(self)
        starts[inside] = self.sequence_offsets[sequences[inside]] // self.dtype.itemsize
        return starts

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop - 1` of the whole `.bin` file, read-only; without `check_size`."""
        if self.mapped is not None:
            return self.mapped[start:stop]
        values = self.read_tokens(start, stop)
        values.flags.writeable = False
        return values

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens `start` to `stop - 1` of the whole `.bin` file, always by plain reads."""
        return self._bin.read(start * self.dtype.itemsize, stop - start, self.dtype)

    def token_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All tokens by blocks of bounded size, with the number of the first token of each; always by plain reads."""
        block = BLOCK_BYTES // self.dtype.itemsize
        for start in range(0, self.num_tokens, block):
            yield start, self.read_tokens(start, min(start + block, self.num_tokens))

    def place(self, token: int) -> tuple[int, int, int]:
        """Document, sequence, and position in the sequence, of token number `token` of the whole `.bin` file."""
        assert 0 <= token < self.num_tokens, f"there is no token {token} among {self.num_tokens}"
        offset = token * self.dtype.itemsize
        # Empty sequences share their offset with the sequence after them, which is the one that holds the token.
        sequence = bisect_right(self.sequence_offsets, offset) - 1
        document = bisect_right(self.document_indices, sequence) - 1
        return document, sequence, (offset - int(self.sequence_offsets[sequence])) // self.dtype.itemsize

    def check_ids(self, vocab_size: int) -> None:
        """Read every token: each must be an id below `vocab_size`. Bounded memory, at the speed of the disk.

        Raises:
            ValueError: a token is outside; names file, byte, document, sequence and position.
        """
        for start, block in self.token_blocks():
            self.check_block(start, block, vocab_size)

    def check_block(self, start: int, block: np.ndarray, vocab_size: int) -> None:
        """`check_ids` for one block of `token_blocks`."""
        if block.min() < 0 or block.max() >= vocab_size:
            wrong = int(np.argmax((block < 0) | (block >= vocab_size)))
            document, sequence, position = self.place(start + wrong)
            raise ValueError(
                f"{self.bin_path}: token {position} of sequence {sequence} in document {document} "
                f"(byte {(start + wrong) * self.dtype.itemsize}) is {int(block[wrong])}, "
                f"but ids of this vocabulary are 0 to {vocab_size - 1}."
            )


def _state(file: InputFile) -> tuple[int, int]:
    return file.size, file.status.st_mtime_ns
