"""The first place where two datasets differ."""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np

from megallm.data.indexed.format import CHECK_CHUNK
from megallm.data.indexed.reader import IndexedDataset


def first_difference(
    one: IndexedDataset, other: IndexedDataset, progress: Callable[[int], None] = lambda count: None
) -> dict[str, Any] | None:
    """The first difference of two datasets, or None where both files are the same, byte for byte.

    Reads every token of both until then, in bounded memory.

    Args:
        progress: called with the number of bytes of `one` read since the last call.

    Returns:
        `document`, its `position` in tokens where the two part (None where only sequences are cut differently or the
        dtype differs), and `what`, a sentence.

    Raises:
        ValueError: a file cannot be read.
    """
    token = _first_token(one, other, progress)
    sequence = _first_entry(one.sequence_lengths, other.sequence_lengths)
    entry = _first_entry(one.document_indices, other.document_indices)
    places = []
    if token is not None:
        places += [_document_of_token(dataset, token) for dataset in (one, other)]
    if sequence is not None:
        places += [_document_of_sequence(dataset, sequence) for dataset in (one, other)]
    if entry is not None:
        # Entry d is the end of document d - 1; entry 0 is 0 in both.
        places.append(entry - 1)
    if places:
        return _describe(one, other, min(places), token)
    if one.dtype != other.dtype:
        what = f"tokens are the same, but stored as {one.dtype.name} and as {other.dtype.name}"
        return {"document": None, "position": None, "what": what}
    return None


def _first_entry(one: np.ndarray, other: np.ndarray) -> int | None:
    """Index of the first entry that differs; the end of the shorter, where that is all."""
    common = min(len(one), len(other))
    for start in range(0, common, CHECK_CHUNK):
        stop = min(common, start + CHECK_CHUNK)
        differ = one[start:stop] != other[start:stop]
        if differ.any():
            return start + int(np.argmax(differ))
    return None if len(one) == len(other) else common


def _first_token(one: IndexedDataset, other: IndexedDataset, progress: Callable[[int], None]) -> int | None:
    """Number of the first token that differs, in the whole files; the end of the shorter, where that is all."""
    common = min(one.num_tokens, other.num_tokens)
    for start, block in one.token_blocks():
        stop = min(common, start + block.size)
        differ = block[: max(0, stop - start)] != other.read_tokens(start, max(start, stop))
        if differ.any():
            return start + int(np.argmax(differ))
        progress(block.nbytes)
    return None if one.num_tokens == other.num_tokens else common


def _document_of_token(dataset: IndexedDataset, token: int) -> int:
    return dataset.place(token)[0] if token < dataset.num_tokens else dataset.num_documents


def _document_of_sequence(dataset: IndexedDataset, sequence: int) -> int:
    return bisect_right(dataset.document_indices, sequence) - 1 if sequence < len(dataset) else dataset.num_documents


def _describe(one: IndexedDataset, other: IndexedDataset, document: int, token: int | None) -> dict[str, Any]:
    """The difference in a document; those before it are the same."""
    if document >= min(one.num_documents, other.num_documents):
        what = f"{one.num_documents} documents in {one.path_prefix}, {other.num_documents} in {other.path_prefix}"
        return {"document": document, "position": None, "what": what}
    (start, one_end), (_, other_end) = one.document_range(document), other.document_range(document)
    common = min(one_end, other_end)
    if token is not None and start <= token < common:
        ids = [int(dataset.read_tokens(token, token + 1)[0]) for dataset in (one, other)]
        what = f"token {ids[0]} in {one.path_prefix}, {ids[1]} in {other.path_prefix}"
        return {"document": document, "position": token - start, "what": what}
    if one_end != other_end:
        what = f"{one_end - start} tokens in {one.path_prefix}, {other_end - start} in {other.path_prefix}"
        return {"document": document, "position": common - start, "what": what}
    what = f"the same tokens, cut into other sequences in {one.path_prefix} than in {other.path_prefix}"
    return {"document": document, "position": None, "what": what}
