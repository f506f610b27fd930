"""Documents in text files: where each one starts, and what it says."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt",)
SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES)


@dataclass(frozen=True)
class RawDocument:
    """A document as it stands in its file.

    Attributes: `file`; `line`, its number from 1, or 0 when the document is the whole file; `content`, the bytes of the
    line or of the file.
    """

    file: str
    line: int
    content: bytes

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.line}" if self.line else self.file


def check_inputs(inputs: Sequence[str]) -> list[Path]:
    """The input files, in the order given.

    Raises:
        ValueError: a file does not exist or is of a kind that is not read.
    """
    paths = [Path(name) for name in inputs]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: --input needs files.")
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is of an unknown kind {path.suffix!r}; read are {', '.join(SUFFIXES)}.")
    return paths


def read_documents(paths: Sequence[Path]) -> Iterator[RawDocument]:
    """All documents of some files: each line of a JSON file that is not blank, each text file as a whole.

    Holds one document at a time.

    Raises:
        ValueError: a file cannot be read.
    """
    for path in paths:
        try:
            if path.suffix in TEXT_SUFFIXES:
                yield RawDocument(str(path), 0, path.read_bytes())
                continue
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield RawDocument(str(path), number, line)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def texts_of(document: RawDocument, keys: Sequence[str]) -> list[list[str]]:
    """For each key the texts that the document has under it: one, or several where the value is a list.

    A text file has one text, whatever the key.

    Raises:
        ValueError: the document is broken or has no text under a key; names file and line.
    """
    try:
        content = document.content.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} (0x{document.content[error.start]:02x}) is no UTF-8"
        raise ValueError(f"{document.place}: {what}.") from None
    if document.line == 0:
        return [[content] for _ in keys]
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{document.place}: no JSON: {error.msg} at character {error.pos + 1} of the line.") from None
    except RecursionError:
        raise ValueError(f"{document.place}: the JSON is nested too deep.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{document.place}: a JSON {_kind(record)} stands where an object must.")
    return [_texts(record, key, document.place) for key in keys]


def _texts(record: dict[str, object], key: str, place: str) -> list[str]:
    if key not in record:
        names = ", ".join(repr(name) for name in list(record)[:8]) or "none"
        raise ValueError(f"{place}: there is no key {key!r}; its keys are {names} (--json-keys chooses).")
    value = record[key]
    texts: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise ValueError(f"{place}: under {key!r} stands a JSON {_kind(text)}, not a text or a list of texts.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(text[error.start]):04x}"
            raise ValueError(f"{place}: under {key!r} stands half a character, {surrogate}.") from None
        texts.append(text)
    return texts


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return names.get(type(value), "null")
