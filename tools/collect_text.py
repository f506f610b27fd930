"""Collects text that every machine has: the source of Python's standard library, as JSON lines."""

import json
import os
import random
import secrets
import sysconfig
import tokenize
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics

from megallm.data.command_line import ToolParser

DESCRIPTION = """\
Collects text that every machine has, as JSON lines with the keys "text" and "source": the modules
of the running Python's standard library with their docstrings, without tests, and the topics of
Python's help. Some ten megabytes.

The order is shuffled with a fixed seed, so that any split holds some of everything, and is the same
on every run. Documents longer than 50 kB are cut at the end of a line."""
EPILOG = """\
example:
  python tools/collect_text.py --output data/python.jsonl"""
# Tests, and what was installed beside the library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Its content is taken as topics, one a document, instead of as one file of string literals.
TOPICS_FILE = "pydoc_data/topics.py"
LONGEST_DOCUMENT = 50_000
SEED = 1234


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write the JSON lines")
    parser.add_argument(
        "--max-megabytes", type=megabytes, metavar="X", help="stop at this size of text, 10^6 bytes each"
    )
    return parser


def megabytes(text: str) -> float:
    """An argparse type: a number above zero, at most a terabyte."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ArgumentTypeError(f"{text!r} is not a number of megabytes above 0 and below 1000000")
    return value


def library_files(root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each module, in the order of their names."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts) and name != TOPICS_FILE:
            try:
                with tokenize.open(path) as file:
                    yield name, file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # a module in an encoding that is not its own, kept to test just that


def cut(text: str, longest: int) -> Iterator[str]:
    """Parts of a text of at most `longest` bytes, each ending with a line; a longer line is a part of its own."""
    part: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        length = len(line.encode("utf-8"))
        if part and size + length > longest:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += length
    if part:
        yield "".join(part)


def collect() -> Iterator[dict[str, str]]:
    """All documents, in the order in which they are written."""
    texts = list(library_files(Path(sysconfig.get_paths()["stdlib"])))
    texts += [(f"pydoc_data/topics/{name}", text) for name, text in sorted(topics.items())]
    random.Random(SEED).shuffle(texts)
    for source, text in texts:
        for part in cut(text, LONGEST_DOCUMENT):
            yield {"text": part, "source": source}


def write(output: Path, limit: float) -> tuple[int, int]:
    """Write documents until `limit` bytes of text; return how many, and their bytes. The file appears when whole.

    Raises ValueError where not even one fits, or the file cannot be written.
    """
    temporary = output.with_name(f"{output.name}.{secrets.token_hex(4)}.tmp")
    documents = size = 0
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8") as file:
            for document in collect():
                length = len(document["text"].encode("utf-8"))
                if size + length > limit:
                    break
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
                documents, size = documents + 1, size + length
        if documents == 0:
            raise ValueError(f"The first document has {length:,} bytes, more than --max-megabytes allows.")
        os.replace(temporary, output)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror}.") from None
    finally:
        # Where a file stands in the place of its folder, there is nothing to remove.
        with suppress(OSError):
            temporary.unlink()
    return documents, size


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)

    def work() -> None:
        limit = float("inf") if options.max_megabytes is None else options.max_megabytes * 1e6
        documents, size = write(Path(options.output), limit)
        print(f"{options.output}: {documents} documents, {size / 1e6:.2f} MB of text")

    parser.run(work)


if __name__ == "__main__":
    main()
