"""Several datasets one after another as one."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megallm.data.indexed.format import file_paths
from megallm.data.indexed.output import DatasetOutput
from megallm.data.indexed.transfer import Piece, whole_dataset, write_pieces
from megallm.data.tokenizer.record import read_record, record_path, write_record

# What decides which text an id stands for, in the record of a tokenizer.
DECISIVE = ("kind", "checksum", "vocab_size", "special_tokens")


def datasets_in(folder: Path) -> list[str]:
    """Path prefixes of all datasets in a folder, in the order of their names, as Megatron merges them.

    Raises:
        ValueError: there is none, or one of the two files of a dataset is missing.
    """
    names = {path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx") and path.is_file()}
    prefixes = sorted({name[:-4] for name in names})
    if not prefixes:
        raise ValueError(f"There is no dataset in {folder}: no .bin and no .idx file.")
    for prefix in prefixes:
        for ending, other in ((".bin", ".idx"), (".idx", ".bin")):
            if prefix + ending not in names:
                raise ValueError(f"{folder / prefix}{ending} is missing, although {prefix}{other} lies there.")
    return [str(folder / prefix) for prefix in prefixes]


def merge_datasets(
    path_prefixes: Sequence[str], output_prefix: str, progress: Callable[[int], None] = lambda count: None
) -> Piece:
    """Write one dataset of the documents of all datasets, in the given order; byte for byte what Megatron merges.

    The output is whole or absent. Memory does not grow with the datasets, but with their number. Records of the
    tokenizer beside the datasets must agree, and one goes beside the output when all of them have one.

    Args:
        path_prefixes: paths of the datasets without `.bin` or `.idx`.
        output_prefix: path of the output without `.bin` or `.idx`.
        progress: called with the number of bytes written since the last call.

    Returns:
        All documents of the output.

    Raises:
        ValueError: a dataset is broken or is the output itself, types or tokenizers differ, the disk is full.
    """
    if not path_prefixes:
        raise ValueError("There is no dataset to merge.")
    check_output_is_no_input(path_prefixes, output_prefix)
    pieces = [whole_dataset(prefix) for prefix in path_prefixes]
    first = pieces[0]
    for piece in pieces:
        if piece.dtype != first.dtype:
            raise ValueError(
                f"Tokens are stored as {first.dtype.name} in {first.path_prefix}, but as {piece.dtype.name} in "
                f"{piece.path_prefix}: datasets of one type only can be merged."
            )
    record = merged_record(path_prefixes)
    output = DatasetOutput(output_prefix)
    write_pieces(output, pieces, progress)
    commit_with_record(output, output_prefix, record)
    return whole_dataset(output_prefix)


def merged_record(path_prefixes: Sequence[str]) -> dict[str, Any] | None:
    """The record of the tokenizer for a dataset made of others; None when one of them has none.

    Numbers, such as counts of documents, are summed; what else differs without changing any id is left out.

    Raises:
        ValueError: the datasets were made with different tokenizers; names two of them.
    """
    records = [read_record(prefix) for prefix in path_prefixes]
    known = [(prefix, record) for prefix, record in zip(path_prefixes, records, strict=True) if record is not None]
    for prefix, record in known[1:]:
        for key in DECISIVE:
            if record[key] != known[0][1][key]:
                raise ValueError(
                    f"{known[0][0]} and {prefix} were made with different tokenizers: {key} {known[0][1][key]} there, "
                    f"{record[key]} here. Their ids do not mean the same, so they cannot be merged."
                )
    if not known or len(known) < len(records):
        return None
    merged = dict(known[0][1])
    for _, record in known[1:]:
        for key in [key for key in merged if key not in DECISIVE]:
            if isinstance(merged[key], int) and isinstance(record.get(key), int) and not isinstance(merged[key], bool):
                merged[key] += record[key]
            elif merged[key] != record.get(key):
                del merged[key]
    return merged


def commit_with_record(output: DatasetOutput, output_prefix: str, record: dict[str, Any] | None) -> None:
    """Move a finished dataset to its place, and the record of its tokenizer, if there is one, beside it.

    Raises:
        ValueError: a file cannot be written.
    """
    with output.writing():
        # A dataset without a record is taken as it is; one beside the record of another dataset would be misread.
        record_path(output_prefix).unlink(missing_ok=True)
    output.commit()
    if record is not None:
        try:
            write_record(output_prefix, record)
        except OSError as error:
            raise ValueError(f"{record_path(output_prefix)} cannot be written: {error.strerror}.") from None


def check_output_is_no_input(path_prefixes: Sequence[str], output_prefix: str) -> None:
    """Raise ValueError when a dataset would be overwritten while it is read."""
    places = {os.path.realpath(path) for path in file_paths(output_prefix)}
    for prefix in path_prefixes:
        if not places.isdisjoint(os.path.realpath(path) for path in file_paths(prefix)):
            raise ValueError(f"{prefix} would be overwritten while it is read: give another --output-prefix.")
