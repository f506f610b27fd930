"""Input files cut into equal parts."""

from collections.abc import Sequence
from pathlib import Path

from megallm.data.text.compression import open_stream
from megallm.data.text.inputs import STANDARD_INPUT, kind_of
from megallm.data.text.raw import Position

BLOCK = 2**16


def cut(paths: Sequence[Path], number: int, count: int) -> tuple[Position, Position | None]:
    """Start and end of part `number` of `count` parts that have about the same bytes, for `read_documents`.

    All files stand one behind another and are cut at equal distances. A plain .jsonl file is cut at the first line that
    starts at the boundary or after it; any other file belongs as a whole to the part in which its first byte lies. All
    parts in order are all documents, each once. Lines before a cut are not counted, since that would read them: the
    place of a document in the rest of a file that was cut is given in bytes.

    Raises:
        ValueError: there is no such part, the standard input is to be cut, or a file cannot be read.
    """
    if not 0 <= number < count:
        raise ValueError(f"There is no part {number} of {count}; the parts are 0 to {count - 1}.")
    if count > 1 and STANDARD_INPUT in paths:
        raise ValueError("The standard input cannot be cut into parts; name files.")
    if count == 1:
        return Position(0, 0, 0), None
    try:
        sizes = [path.stat().st_size for path in paths]
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.") from None
    total = sum(sizes)
    end = None if number == count - 1 else _boundary(paths, sizes, total * (number + 1) // count)
    return _boundary(paths, sizes, total * number // count), end


def _boundary(paths: Sequence[Path], sizes: list[int], distance: int) -> Position:
    """The first place where a file may be cut, `distance` bytes or more from the start of the first file."""
    first = 0
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if first >= distance:
            return Position(number, 0, 0)
        if distance < first + size and kind_of(path) == (".jsonl", ""):
            offset = _line_start(path, distance - first)
            return Position(number + 1, 0, 0) if offset is None else Position(number, offset, -1)
        first += size
    return Position(len(paths), 0, 0)


def _line_start(path: Path, offset: int) -> int | None:
    """Offset of the first line that starts at `offset` or after it; None when there is none."""
    with open_stream(path) as stream:
        # A line starts at `offset` when the byte before it ends one.
        position = offset - 1
        stream.seek(position)
        while block := stream.read(BLOCK):
            found = block.find(b"\n")
            if found >= 0:
                position += found + 1
                return position if position + 1 <= stream.seek(0, 2) else None
            position += len(block)
    return None
