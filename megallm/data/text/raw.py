"""A document as it stands in its file, the place where reading goes on, and what a broken one is."""

from typing import NamedTuple

# The longest document that is read unless another limit is given. Making texts of one needs about ten times its bytes,
# and making tokens of them up to 140 times.
MAX_DOCUMENT_BYTES = 64 * 2**20


class Position(NamedTuple):
    """Where a document starts, among several input files.

    Attributes: `file`, index of the file; `offset`, bytes before it in the file once unpacked, for Parquet rows before
    it; `line`, lines before it, or -1 where nobody has counted them. Positions compare in the order of reading.
    """

    file: int
    offset: int
    line: int


class BadDocument(ValueError):
    """A document that gives no text.

    Attributes: `kind`, one of "blank" (line with nothing in it), "empty" (text file with nothing in it), "too_large",
    "no_utf8", "no_json", "no_object", "missing_key", "repeated_key", "not_text". The message names file and line.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


class RawDocument(NamedTuple):
    """A document as it stands in its file.

    Attributes:
        file: name of the file.
        line: its number from 1 (for Parquet the row's), 0 when the document is the whole file, -1 when not counted.
        content: bytes of the line without its end, of the JSON value or of the file; of a Parquet row its texts as a
            JSON object. Empty when `problem` is set.
        start: offset of its first byte, as in `Position`.
        next_file, next_offset, next_line: the fields of `next`.
        problem: why it is broken, where reading has noticed that already; `texts_of` raises it.
    """

    file: str
    line: int
    content: bytes
    start: int
    next_file: int
    next_offset: int
    next_line: int
    problem: BadDocument | None = None

    @property
    def next(self) -> Position:
        """Where reading goes on after this document."""
        return Position(self.next_file, self.next_offset, self.next_line)

    @property
    def place(self) -> str:
        return place_of(self.file, self.line, self.start)

    @property
    def is_blank(self) -> bool:
        return self.problem is not None and self.problem.kind == "blank"


def place_of(file: str, line: int, start: int) -> str:
    """Name of a place for messages: file and line, or the byte where lines were not counted."""
    if line > 0:
        return f"{file}, {'row' if file.endswith('.parquet') else 'line'} {line}"
    return file if line == 0 else f"{file}, line at byte {start}"


def too_large(place: str, size: int, limit: int) -> BadDocument:
    """The error for a document of `size` bytes where `limit` are allowed."""
    return BadDocument("too_large", f"{place}: the document has {size:,} bytes, the limit is {limit:,}.")
