"""JSON documents that spread over lines: the elements of one array, or objects one after another."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from megallm.data.text.compression import READ_BLOCK, first_block, open_stream
from megallm.data.text.raw import BadDocument, Position, RawDocument, place_of, too_large

_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_STRUCTURE = re.compile(rb'["\[\]{}]')
_STRUCTURE_OR_COMMA = re.compile(rb'["\[\]{},]')
_STRUCTURE_OR_LINE = re.compile(rb'["\[\]{}\n]')
_QUOTE, _BACKSLASH, _COMMA, _NEWLINE = b'"\\,\n'
_OPENING, _CLOSING = b"[{", b"]}"


def json_form(path: Path, limit: int) -> Literal["lines", "array", "objects"]:
    """How the documents of a .json file stand in it, by its beginning.

    An array when it begins with `[`; objects over several lines when the first line ends inside the first object;
    otherwise lines. Reads the first line, `limit` bytes of it at most, and holds 1 MiB.

    Raises:
        ValueError: the file cannot be read.
    """
    with open_stream(path) as stream:
        scan = _ValueScan(array=False)
        size = 0
        block, _ = first_block(stream)
        while block and size <= limit:
            at = 0
            if not size:
                first = _NOT_BLANK.search(block)
                if first is None:
                    block = stream.read(READ_BLOCK)
                    continue
                at = first.start()
                if block[at] != ord("{"):
                    return "array" if block[at] == ord("[") else "lines"
            line_end = block.find(b"\n", at)
            if scan.find_end(block if line_end < 0 else block[:line_end], at) >= 0:
                return "lines"
            if line_end >= 0:
                # A string never holds a line's end: a first line that ends in one is broken, not continued.
                return "lines" if scan.in_string else "objects"
            size += len(block) - at
            block = stream.read(READ_BLOCK)
    return "lines"


class _ValueScan:
    """Finds the end of one JSON value in blocks of bytes, by its quotes and brackets alone.

    Args:
        array: the value is an element: it goes on to a comma or the closing bracket of the array. Otherwise it ends
            with its own closing bracket, and what is no object or array with its line.
    """

    def __init__(self, array: bool) -> None:
        self._array = array
        self._depth = 0
        self._backslashes = 0
        self.in_string = False

    def find_end(self, block: bytes, at: int) -> int:
        """Index in the block after the value that goes on at index `at`; -1 when the block does not hold its end."""
        while True:
            if self.in_string:
                at = self._string_end(block, at)
                if at < 0:
                    return -1
            shallow = _STRUCTURE_OR_COMMA if self._array else _STRUCTURE_OR_LINE
            found = (_STRUCTURE if self._depth else shallow).search(block, at)
            if found is None:
                return -1
            byte, at = block[found.start()], found.end()
            if byte == _QUOTE:
                self.in_string = True
            elif byte in _OPENING:
                self._depth += 1
            elif byte in _CLOSING:
                if self._depth == 0 and self._array:
                    return found.start()
                self._depth = max(self._depth - 1, 0)
                if self._depth == 0 and not self._array:
                    return at
            else:
                return found.start()

    def _string_end(self, block: bytes, at: int) -> int:
        """Index after the quote that ends the string, or -1; a quote behind an odd run of backslashes ends nothing."""
        while True:
            quote = block.find(b'"', at)
            stop = len(block) if quote < 0 else quote
            run = stop
            while run > at and block[run - 1] == _BACKSLASH:
                run -= 1
            count = stop - run + (self._backslashes if run == at else 0)
            if quote < 0:
                self._backslashes = count
                return -1
            self._backslashes = 0
            at = quote + 1
            if count % 2 == 0:
                self.in_string = False
                return at


class _Cursor:
    """A place in a stream that is read in blocks: the block at hand, the index in it, and the lines before it."""

    def __init__(self, stream: BinaryIO, offset: int, lines: int) -> None:
        self._stream = stream
        self.at = 0
        self.lines = lines
        if offset == 0:
            self.block, self._base = first_block(stream)
        else:
            self.block, self._base = stream.read(READ_BLOCK), offset

    @property
    def offset(self) -> int:
        return self._base + self.at

    def take(self, stop: int) -> bytes:
        """The bytes up to index `stop` of the block, and go there."""
        piece = self.block[self.at : stop]
        self.lines += piece.count(b"\n")
        self.at = stop
        return piece

    def next_block(self) -> bool:
        """Go to the start of the following block; False at the end of the stream."""
        self._base += len(self.block)
        self.block, self.at = self._stream.read(READ_BLOCK), 0
        return bool(self.block)

    def skip_blanks(self) -> int:
        """Go to the next byte that is not blank and return it, or -1 at the end of the stream."""
        while True:
            found = _NOT_BLANK.search(self.block, self.at)
            self.take(found.start() if found else len(self.block))
            if found:
                return self.block[self.at]
            if not self.next_block():
                return -1


def read_values(
    stream: BinaryIO, file: str, start: Position, end: int | None, limit: int, array: bool
) -> Iterator[RawDocument]:
    """The elements of an array, or objects one after another, from a stream that stands at `start`.

    Holds two blocks of 1 MiB and one document of at most `limit` bytes twice; longer ones are counted, not held. What
    stands where a document should comes out as one, and is found broken when it is parsed. An array that does not
    close, or text after it, is one broken document more.

    Args: as `read_lines`; `array` as `json_form` found.
    """
    cursor = _Cursor(stream, start.offset, start.line)
    after_element = array and start.offset > 0
    if array and not after_element:
        cursor.skip_blanks()
        cursor.take(cursor.at + 1)
    while True:
        byte = cursor.skip_blanks()
        if after_element and byte == _COMMA:
            cursor.take(cursor.at + 1)
            byte = cursor.skip_blanks()
        if end is not None and cursor.offset >= end:
            return
        if array and byte < 0:
            yield _broken(file, start.file, cursor, "the file ends before its array does")
            return
        if array and byte == ord("]"):
            cursor.take(cursor.at + 1)
            if cursor.skip_blanks() >= 0:
                yield _broken(file, start.file, cursor, "there is text after the end of the array")
            return
        if byte < 0:
            return
        yield _read_value(cursor, file, start.file, limit, array)
        after_element = array


def _read_value(cursor: _Cursor, file: str, number: int, limit: int, array: bool) -> RawDocument:
    start, line = cursor.offset, cursor.lines + 1
    scan = _ValueScan(array)
    pieces: list[bytes] = []
    size = 0
    found = -1
    while found < 0:
        found = scan.find_end(cursor.block, cursor.at)
        piece = cursor.take(found if found >= 0 else len(cursor.block))
        size += len(piece)
        if size > limit:
            pieces.clear()
        else:
            pieces.append(piece)
        if found < 0 and not cursor.next_block():
            break
    place = place_of(file, line, start)
    content, problem = b"", None
    if size > limit:
        problem = too_large(place, size, limit)
    elif size == 0:
        # The comma goes with the document that is missing before it: each document takes some bytes.
        cursor.take(cursor.at + 1)
        problem = BadDocument("no_json", f"{place}: nothing stands before the comma.")
    else:
        content = b"".join(pieces).rstrip()
    return RawDocument(file, line, content, start, number, cursor.offset, cursor.lines, problem)


def _broken(file: str, number: int, cursor: _Cursor, what: str) -> RawDocument:
    """A document that stands for the broken end of an array; reading goes on in the next file."""
    line = cursor.lines + 1
    problem = BadDocument("no_json", f"{place_of(file, line, cursor.offset)}: {what}.")
    return RawDocument(file, line, b"", cursor.offset, number + 1, 0, 0, problem)
