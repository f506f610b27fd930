"""What is in a dataset: lengths of documents and sequences, special tokens, the tokens that documents end with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megallm.data.indexed.index import chunks
from megallm.data.indexed.reader import IndexedDataset

# Tokens of one document that a sample looks at, besides the last one.
SAMPLED_TOKENS = 1 << 16


@dataclass
class Lengths:
    """Lengths in tokens, added up chunk by chunk: `count`, `total`, `shortest`, `longest`, and how many have n bits."""

    count: int = 0
    total: int = 0
    shortest: int = 0
    longest: int = 0
    by_bits: np.ndarray = field(default_factory=lambda: np.zeros(64, np.int64))

    def add(self, lengths: np.ndarray) -> None:
        if lengths.size == 0:
            return
        shortest = int(lengths.min())
        self.shortest = min(self.shortest, shortest) if self.count else shortest
        self.longest = max(self.longest, int(lengths.max()))
        self.count += lengths.size
        self.total += int(lengths.sum(dtype=np.int64))
        # The exponent of a float64 is the number of bits of a whole number, 0 for 0.
        self.by_bits += np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=64)

    def as_dict(self) -> dict[str, Any]:
        """`min`, `mean`, `max`, and a histogram over the ranges 0, 1, 2 to 3, 4 to 7, ..."""
        present = np.flatnonzero(self.by_bits)
        bits = range(int(present[0]), int(present[-1]) + 1) if present.size else range(0)
        return {
            "min": self.shortest,
            "mean": self.total / self.count if self.count else 0.0,
            "max": self.longest,
            "histogram": [
                {"from": (1 << number) >> 1, "to": max(0, (1 << number) - 1), "count": int(self.by_bits[number])}
                for number in bits
            ],
        }


def describe(dataset: IndexedDataset) -> dict[str, Any]:
    """Counts, dtype, and lengths of sequences and documents, from the index alone; in bounded memory."""
    sequences, documents = Lengths(), Lengths()
    for part in chunks(dataset.sequence_lengths):
        sequences.add(part)
    start = 0
    for ends in document_ends(dataset):
        documents.add(np.diff(ends, prepend=start))
        start = int(ends[-1])
    return {
        "prefix": dataset.path_prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "documents_without_tokens": int(documents.by_bits[0]),
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        "bin_bytes": dataset.num_tokens * dataset.dtype.itemsize,
        "document_lengths": documents.as_dict(),
        "sequence_lengths": sequences.as_dict(),
    }


def document_ends(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """Number of the token after the last one of each document, in the whole `.bin` file, int64, by chunks."""
    for part in chunks(dataset.document_indices, start=1):
        yield dataset.token_starts(part)


@dataclass
class TokenReport:
    """What the tokens themselves show.

    Attributes: `documents` and `tokens` looked at; `counts` of each special token; `ended`, documents that end with the
    end-of-document token; `first_not_ended`, the first document with tokens that does not.
    """

    counts: dict[int, int]
    documents: int = 0
    tokens: int = 0
    ended: int = 0
    first_not_ended: int | None = None

    def add_tokens(self, tokens: np.ndarray) -> None:
        self.tokens += tokens.size
        for token_id in self.counts:
            self.counts[token_id] += int(np.count_nonzero(tokens == token_id))

    def add_ends(self, documents: np.ndarray, last_tokens: np.ndarray, end_id: int | None) -> None:
        """Numbers of some documents that have tokens, and the last token of each."""
        self.documents += len(documents)
        if end_id is None:
            return
        ended = last_tokens == end_id
        self.ended += int(np.count_nonzero(ended))
        if self.first_not_ended is None and not ended.all():
            self.first_not_ended = int(documents[np.argmin(ended)])


def sample_tokens(dataset: IndexedDataset, special_ids: list[int], end_id: int | None, documents: int) -> TokenReport:
    """Look at `documents` documents, spread evenly over the dataset, and of long ones at the start and the last token.

    Raises:
        ValueError: a file cannot be read.
    """
    report = TokenReport(dict.fromkeys(special_ids, 0))
    dataset.check_size()
    count = min(documents, dataset.num_documents)
    for document in np.linspace(0, dataset.num_documents - 1, count).astype(np.int64).tolist():
        start, stop = dataset.document_range(document)
        if start < stop:
            report.add_tokens(dataset.tokens(start, min(stop, start + SAMPLED_TOKENS)))
            report.add_ends(np.array([document]), dataset.tokens(stop - 1, stop), end_id)
    return report


def scan_tokens(
    dataset: IndexedDataset,
    special_ids: list[int],
    end_id: int | None,
    vocab_size: int | None,
    progress: Callable[[int], None] = lambda count: None,
) -> TokenReport:
    """Read every token, in bounded memory; those of a vocabulary must be below its size.

    Args:
        special_ids: ids to count.
        end_id: the token that ends documents, where it is known.
        vocab_size: without it any id passes.
        progress: called with the number of bytes read since the last call.

    Raises:
        ValueError: an id is outside of the vocabulary, or the file cannot be read.
    """
    report = TokenReport(dict.fromkeys(special_ids, 0))
    last_tokens = _last_tokens(dataset)
    documents, positions = next(last_tokens, (np.empty(0, np.int64), np.empty(0, np.int64)))
    for start, block in dataset.token_blocks():
        if vocab_size is not None:
            dataset.check_block(start, block, vocab_size)
        report.add_tokens(block)
        while positions.size:
            inside = int(np.searchsorted(positions, start + block.size))
            report.add_ends(documents[:inside], block[positions[:inside] - start], end_id)
            documents, positions = documents[inside:], positions[inside:]
            if positions.size:
                break
            documents, positions = next(last_tokens, (documents, positions))
        progress(block.nbytes)
    return report


def _last_tokens(dataset: IndexedDataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of the documents that have tokens, and of the last token of each, by chunks that are not empty."""
    first = start = 0
    for ends in document_ends(dataset):
        has_tokens = np.flatnonzero(np.diff(ends, prepend=start))
        if has_tokens.size:
            yield first + has_tokens, ends[has_tokens] - 1
        first, start = first + len(ends), int(ends[-1])
