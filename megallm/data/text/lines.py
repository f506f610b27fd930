"""The lines of a stream, each a document."""

from collections.abc import Iterator
from typing import BinaryIO

from megallm.data.text.compression import READ_BLOCK, first_block
from megallm.data.text.raw import BadDocument, Position, RawDocument, place_of, too_large


def read_lines(stream: BinaryIO, file: str, start: Position, end: int | None, limit: int) -> Iterator[RawDocument]:
    """The lines of a stream that stands at `start`, without their ends.

    A line may end in CR LF: the CR stays, JSON takes it for a blank. Holds two blocks of 1 MiB and one line of at most
    `limit` bytes twice; longer lines are counted, not held.

    Args:
        stream: unpacked bytes.
        file: name of the file for messages.
        start: place in the files where the stream stands.
        end: lines that start at this offset or later are left out; None reads all.
        limit: bytes of the longest line that is given out.
    """
    number, offset, line = start
    # A count that nobody began stays unknown.
    step = 0 if line < 0 else 1
    last = float("inf") if end is None else end
    held: list[bytes] = []
    held_size = 0
    if offset == 0:
        block, offset = first_block(stream)
    else:
        block = stream.read(READ_BLOCK)
    while block:
        lines = block.split(b"\n")
        rest = lines.pop()
        if lines and held_size:
            size = held_size + len(lines[0])
            if offset >= last:
                return
            line += step
            if size > limit:
                yield _without_content(file, line, offset, number, offset + size + 1, size, limit)
            else:
                held.append(lines[0])
                content = b"".join(held)
                yield _line(file, line, content, offset, number, offset + size + 1, limit)
            offset += size + 1
            held, held_size = [], 0
            del lines[0]
        for content in lines:
            if offset >= last:
                return
            line += step
            following = offset + len(content) + 1
            if len(content) > limit or content.isspace() or not content:
                yield _line(file, line, content, offset, number, following, limit)
            else:
                yield RawDocument(file, line, content, offset, number, following, line)
            offset = following
        if rest:
            held_size += len(rest)
            if held_size > limit:
                held.clear()
            else:
                held.append(rest)
        block = stream.read(READ_BLOCK)
    if held_size and offset < last:
        line += step
        following = offset + held_size
        if held_size > limit:
            yield _without_content(file, line, offset, number, following, held_size, limit)
        else:
            yield _line(file, line, b"".join(held), offset, number, following, limit)


def _line(file: str, line: int, content: bytes, start: int, number: int, following: int, limit: int) -> RawDocument:
    if len(content) > limit:
        return _without_content(file, line, start, number, following, len(content), limit)
    if content and not content.isspace():
        return RawDocument(file, line, content, start, number, following, line)
    problem = BadDocument("blank", f"{place_of(file, line, start)}: the line is blank.")
    return RawDocument(file, line, b"", start, number, following, line, problem)


def _without_content(
    file: str, line: int, start: int, number: int, following: int, size: int, limit: int
) -> RawDocument:
    problem = too_large(place_of(file, line, start), size, limit)
    return RawDocument(file, line, b"", start, number, following, line, problem)
