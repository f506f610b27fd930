"""The input as pieces of bounded size, to be encoded anywhere and written in order."""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megallm.data.text.documents import read_documents
from megallm.data.text.inputs import STANDARD_INPUT, kind_of
from megallm.data.text.raw import Position, RawDocument

# Large enough to hide the cost of handing over, small in memory. A piece is one document where that is longer.
PIECE_BYTES = 1 << 20
PIECE_DOCUMENTS = 4096


@dataclass(frozen=True)
class Input:
    """What is read.

    Attributes: `paths` of the files; `end`, where reading stops, or None; `max_document_bytes`, the longest document
    that is taken; `keys`, columns to read of Parquet files.
    """

    paths: tuple[Path, ...]
    end: Position | None
    max_document_bytes: int
    keys: tuple[str, ...]

    def read(self, start: Position, end: Position | None) -> Iterator[RawDocument]:
        return read_documents(self.paths, start, end, self.max_document_bytes, self.keys)


@dataclass(frozen=True)
class Piece:
    """Some documents in a row.

    Attributes: `start`, and `next`, where the following piece starts; `documents`, or None where whoever encodes the
    piece reads them from the files: then only the place travels.
    """

    start: Position
    next: Position
    documents: list[RawDocument] | None = None


def whole_pieces(source: Input, start: Position) -> Iterator[Piece]:
    """The input from `start` on, read here."""
    return _batches(source.read(start, source.end), start)


def light_pieces(source: Input, start: Position) -> Iterator[Piece]:
    """The same documents; those of plain .jsonl and .txt files as places alone."""
    here = start
    while here.file < len(source.paths) and (source.end is None or here[:2] < source.end[:2]):
        if _is_plain(source.paths[here.file], ".jsonl"):
            pieces = _line_pieces(source, here)
        elif _is_plain(source.paths[here.file], ".txt"):
            pieces = _file_pieces(source, here)
        else:
            end = _earlier(Position(here.file + 1, 0, 0), source.end)
            pieces = _batches(source.read(here, end), here)
        file = here.file
        for piece in pieces:
            yield piece
            here = piece.next
        # A file without documents, or the rest of one after its last document.
        here = max(here, Position(file + 1, 0, 0))


def _is_plain(path: Path, form: str) -> bool:
    # Only what can be read at any place, by several processes: no pipe.
    return path != STANDARD_INPUT and kind_of(path) == (form, "") and stat.S_ISREG(os.stat(path).st_mode)


def _earlier(position: Position, end: Position | None) -> Position:
    return position if end is None or position[:2] <= end[:2] else end


def _batches(documents: Iterable[RawDocument], start: Position) -> Iterator[Piece]:
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= PIECE_BYTES or len(batch) == PIECE_DOCUMENTS:
            yield Piece(start, document.next, batch)
            start, batch, size = document.next, [], 0
    if batch:
        yield Piece(start, batch[-1].next, batch)


def _line_pieces(source: Input, start: Position) -> Iterator[Piece]:
    """The rest of a file of lines, cut after the last line of each block; lines are counted where they were before."""
    number, offset, line = start
    path = source.paths[number]
    after = Position(number + 1, 0, 0)
    end = _earlier(after, source.end)
    stop = end.offset if end.file == number else None
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while stop is None or offset < stop:
                length, lines = 0, 0
                while block := file.read(PIECE_BYTES):
                    found = block.rfind(b"\n") + 1
                    lines += block.count(b"\n")
                    length += found or len(block)
                    if found:
                        file.seek(found - len(block), os.SEEK_CUR)
                        break
                if not length:
                    return
                begin = Position(number, offset, line)
                offset += length
                line = line if line < 0 else line + lines
                yield Piece(begin, _earlier(Position(number, offset, line) if block else after, source.end))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def _file_pieces(source: Input, start: Position) -> Iterator[Piece]:
    """Text files, some at once where they are small; ends before the first file of another kind."""
    begin, number, size = start, start.file, 0
    last = len(source.paths) if source.end is None else source.end.file
    while number < last and _is_plain(source.paths[number], ".txt"):
        size += source.paths[number].stat().st_size
        number += 1
        if size >= PIECE_BYTES or number - begin.file == PIECE_DOCUMENTS:
            yield Piece(begin, Position(number, 0, 0))
            begin, size = Position(number, 0, 0), 0
    if number > begin.file:
        yield Piece(begin, Position(number, 0, 0))
