"""The rows of a Parquet file, each a document."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megallm.data.text.raw import BadDocument, Position, RawDocument, place_of, too_large

# Text that one batch of rows should hold, by the average of its row group, and the rows that it may have.
BATCH_BYTES = 4 * 2**20
BATCH_ROWS = 1024


def read_rows(
    path: Path, start: Position, end: int | None, limit: int, keys: Sequence[str] | None
) -> Iterator[RawDocument]:
    """The rows from `start.offset` to before row `end`, each as a JSON object of its texts.

    Row groups before the start are not read. Memory: a batch of about 4 MiB of text three times over, and the pages at
    hand of each column. Rows of one group that differ much in length make it more, and a row beyond `limit` is held
    too: the format gives its values whole.

    Args:
        path: a Parquet file.
        start: index of the file and of the first row.
        end: rows from this index on are left out; None reads all.
        limit: bytes of the longest document that is given out.
        keys: columns to read; None reads all that hold text or lists of text.

    Raises:
        ValueError: pyarrow is missing; the file is no Parquet or damaged; a column is not there or holds no text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"Reading {path} needs the package pyarrow: pip install pyarrow.") from None
    row = start.offset
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            columns = _columns(path, file.schema_arrow, keys)
            last = file.metadata.num_rows if end is None else min(end, file.metadata.num_rows)
            if row > file.metadata.num_rows:
                raise ValueError(
                    f"{path} has {file.metadata.num_rows:,} rows, yet reading should go on at row {row:,}: it changed."
                )
            for batch, skipped in _batches(file, columns, row):
                for texts in _rows(batch.slice(skipped)):
                    if row >= last:
                        return
                    yield _document(str(path), start.file, row, texts, limit)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} cannot be read beyond row {row:,}: {reason}.") from None


def _columns(path: Path, schema: Any, keys: Sequence[str] | None) -> list[str]:
    if keys is None:
        return [field.name for field in schema if _holds_text(field.type)]
    for key in keys:
        if key not in schema.names:
            names = ", ".join(repr(name) for name in schema.names)
            raise ValueError(f"{path} has no column {key!r}; its columns are {names} (--json-keys chooses).")
        kind = schema.field(key).type
        if not _holds_text(kind):
            raise ValueError(f"{path}: the column {key!r} holds {kind}, not texts or lists of texts.")
    return list(dict.fromkeys(keys))


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _batches(file: Any, columns: list[str], row: int) -> Iterator[tuple[Any, int]]:
    """Batches of rows from the one that holds `row`, each with the number of its rows that come before `row`."""
    first = 0
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        if first + group.num_rows > row:
            average = max(1, group.total_byte_size // group.num_rows)
            size = min(BATCH_ROWS, max(1, BATCH_BYTES // average))
            position = first
            for batch in file.iter_batches(size, row_groups=[index], columns=columns, use_threads=False):
                if position + batch.num_rows > row:
                    yield batch, max(0, row - position)
                position += batch.num_rows
        first += group.num_rows


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Each row as texts by column, or the error where a text is no UTF-8."""
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield {name: column[index].as_py() for name, column in zip(names, batch.columns, strict=True)}
            except UnicodeDecodeError as error:
                yield error
        return
    for texts in zip(*columns, strict=True):
        yield dict(zip(names, texts, strict=True))


def _document(file: str, number: int, row: int, texts: dict[str, Any] | UnicodeDecodeError, limit: int) -> RawDocument:
    place = place_of(file, row + 1, row)
    content, problem = b"", None
    if isinstance(texts, UnicodeDecodeError):
        what = f"byte {texts.start + 1} of a text (0x{texts.object[texts.start]:02x}) is no UTF-8"
        problem = BadDocument("no_utf8", f"{place}: {what}.")
    else:
        content = json.dumps(texts, ensure_ascii=False).encode("utf-8")
        if len(content) > limit:
            content, problem = b"", too_large(place, len(content), limit)
    return RawDocument(file, row + 1, content, row, number, row + 1, row + 1, problem)
