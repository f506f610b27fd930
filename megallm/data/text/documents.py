"""Documents of input files, read one after another from any place, and the texts that they hold."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from megallm.data.text.compression import BYTE_ORDER_MARK, READ_BLOCK, open_stream, skip_bytes
from megallm.data.text.inputs import kind_of, name_of
from megallm.data.text.json_values import json_form, read_values
from megallm.data.text.lines import read_lines
from megallm.data.text.parquet import read_rows
from megallm.data.text.raw import MAX_DOCUMENT_BYTES, BadDocument, Position, RawDocument, too_large

START = Position(0, 0, 0)


def read_documents(
    paths: Sequence[Path],
    start: Position = START,
    end: Position | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    keys: Sequence[str] | None = None,
) -> Iterator[RawDocument]:
    """The documents of some files from `start` to before `end`, in order.

    A document is a line of a .jsonl file; a line, an element of the one array, or an object over several lines of a
    .json file; a whole .txt file; a row of a .parquet file. Broken documents come out too, with `problem` set or by
    `texts_of`; nothing is left out, blank lines neither.

    Memory: 2 MiB and twice the longest document within the limit; packed files see `open_stream`, Parquet `read_rows`.

    Args:
        paths: input files, of `find_inputs`.
        start: the beginning, a document's `next`, or a place of `cut`. A plain file goes on there at once, a packed one
            is unpacked up to there.
        end: the same; None reads to the end.
        max_document_bytes: longer documents are never held in memory; they come out broken ("too_large").
        keys: columns that are read of Parquet files; None reads all that hold text.

    Raises:
        ValueError: a file cannot be opened or read, is damaged, or lacks a column.
    """
    for number in range(start.file, len(paths)):
        if end is not None and (number > end.file or (number == end.file and end.offset == 0)):
            return
        path = paths[number]
        name = name_of(path)
        begin = start if number == start.file else Position(number, 0, 0)
        last = end.offset if end is not None and number == end.file else None
        form = kind_of(path).format
        if form == ".parquet":
            yield from read_rows(path, begin, last, max_document_bytes, keys)
            continue
        shape = json_form(path, max_document_bytes) if form == ".json" else "lines"
        with open_stream(path) as stream:
            if form == ".txt":
                yield _read_whole(stream, path, number, max_document_bytes)
                continue
            if begin.offset:
                skip_bytes(stream, begin.offset, name)
            if shape == "lines":
                yield from read_lines(stream, name, begin, last, max_document_bytes)
            else:
                yield from read_values(stream, name, begin, last, max_document_bytes, shape == "array")


def _read_whole(stream: BinaryIO, path: Path, number: int, limit: int) -> RawDocument:
    """A text file as one document."""
    blocks: list[bytes] = []
    size = 0
    while block := stream.read(READ_BLOCK):
        size += len(block)
        if size > limit + len(BYTE_ORDER_MARK):
            blocks.clear()
        else:
            blocks.append(block)
    content = b"".join(blocks).removeprefix(BYTE_ORDER_MARK)
    problem = None
    if size > limit + len(BYTE_ORDER_MARK) or len(content) > limit:
        content, problem = b"", too_large(str(path), size, limit)
    elif not content or content.isspace():
        content, problem = b"", BadDocument("empty", f"{path}: there is nothing in the file.")
    return RawDocument(str(path), 0, content, 0, number + 1, 0, 0, problem)


class _Repeated(dict[str, object]):
    """A JSON object in which a key stands more than once."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.keys_repeated = {key for key in keys if keys.count(key) > 1} if len(keys) < 1000 else set(keys)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    return record if len(record) == len(pairs) else _Repeated(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def texts_of(document: RawDocument, keys: Sequence[str]) -> list[list[str]]:
    """For each key the texts that the document has under it: one, or several where the value is a list.

    A text file has one text, whatever the key. What stands under other keys is not looked at, as long as it is JSON (or
    NaN or Infinity, which some programs write). Needs about nine times the document's bytes at worst.

    Raises:
        BadDocument: the document is broken or has no text under a key; names file and line.
    """
    if document.problem is not None:
        raise document.problem
    try:
        content = document.content.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} (0x{document.content[error.start]:02x}) is no UTF-8"
        raise BadDocument("no_utf8", f"{document.place}: {what}.") from None
    if document.line == 0:
        return [[content] for _ in keys]
    record = _record(content, document)
    return [_texts(record, key, document) for key in keys]


def _record(content: str, document: RawDocument) -> dict[str, object]:
    try:
        record = _DECODER.decode(content)
    except json.JSONDecodeError as error:
        # Some of the parser's sentences end in "starting at" themselves.
        what = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
        raise BadDocument("no_json", f"{document.place}: no JSON: {what} of the document.") from None
    except RecursionError:
        raise BadDocument("no_json", f"{document.place}: the JSON is nested too deep.") from None
    except ValueError as error:
        # A number of more digits than Python converts.
        raise BadDocument("no_json", f"{document.place}: no JSON that can be read: {error}.") from None
    if not isinstance(record, dict):
        what = f"a JSON {_kind(record)} stands where an object must"
        raise BadDocument("no_object", f"{document.place}: {what}.")
    return record


def _texts(record: dict[str, object], key: str, document: RawDocument) -> list[str]:
    if key not in record:
        names = ", ".join(repr(name) for name in list(record)[:8]) or "none"
        what = f"there is no key {key!r}; its keys are {names} (--json-keys chooses)"
        raise BadDocument("missing_key", f"{document.place}: {what}.")
    if isinstance(record, _Repeated) and key in record.keys_repeated:
        raise BadDocument("repeated_key", f"{document.place}: the key {key!r} stands there more than once.")
    value = record[key]
    if not isinstance(value, (str, list)):
        what = f"under {key!r} stands a JSON {_kind(value)}, not a text or a list of texts"
        raise BadDocument("not_text", f"{document.place}: {what}.")
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            what = f"in the list under {key!r} stands a JSON {_kind(text)}, not a text"
            raise BadDocument("not_text", f"{document.place}: {what}.")
        try:
            # An escape in the JSON may stand for half of a character, which is no text.
            _ = text.isascii() or text.encode()
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(text[error.start]):04x}"
            what = f"under {key!r} stands half a character, {surrogate}"
            raise BadDocument("not_text", f"{document.place}: {what}.") from None
    return texts


def _kind(value: object) -> str:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"number that is none ({value})"
    for kind, name in {bool: "truth value", dict: "object", list: "list", str: "text"}.items():
        if isinstance(value, kind):
            return name
    return "null" if value is None else "number"
