"""A much faster library for preprocessing, trusted only as far as it gives the reference library's ids."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megallm.data.tokenizer.base import Tokenizer
from megallm.data.tokenizer.gigatoken import FastLibrary, find_gigatoken
from megallm.data.tokenizer.hard_texts import hard_texts

# Characters of the first documents that the reference encodes, too; later one of every thousand. The reference is 10 to
# 40 times slower: so much costs a few hundredths of the time.
FIRST_CHECKED = 1 << 16
CHECKED_SHARE = 1e-3
SHORTEST_EXCERPT = 256
# The library remembers every word that it has met, without end. It is loaded anew when the process has grown by this
# much, but not before so much text, since loading takes a quarter of a second.
LARGEST_GROWTH = 256 << 20
TEXT_BETWEEN_LOADS = 32 << 20
# Documents that are on average shorter are handed over all at once, which needs the import of another package.
SHORT_DOCUMENT = 1024


class FastTokenizerDiffers(ValueError):
    """The fast library gave other ids than the reference. `index` is the text's place in the batch."""

    def __init__(self, index: int, sentence: str) -> None:
        super().__init__(sentence)
        self.index = index


class FastTokenizer(Tokenizer):
    """A reference tokenizer whose `encode_flat` is done by a fast library.

    The ids are compared with the reference's: on texts that are known to be hard, when it is made; on the first
    documents; and on a random sample as long as it is used. Texts on which the library is known to differ, and
    everything else, are the reference's own work.

    Args:
        reference: whose ids count.
        load: makes the fast library's tokenizer.
        name: of the fast library, with its version.
        differs_on: whether the library is known to give other ids for a text.

    Raises:
        ValueError: the library does not read this tokenizer, or gives other ids.
        FastTokenizerDiffers: (of `encode_flat`) the ids of a document differ.
    """

    def __init__(
        self,
        reference: Tokenizer,
        load: Callable[[], FastLibrary],
        name: str,
        differs_on: Callable[[str], bool] | None = None,
    ) -> None:
        for attribute in Tokenizer.__annotations__:
            setattr(self, attribute, getattr(reference, attribute))
        self._reference, self._load, self._differs_on = reference, load, differs_on
        self.fast_library = name
        # The fast library puts none.
        self._prefix, self._suffix = reference.surroundings()
        self._load_library()
        self._random = random.Random()
        # Characters that the reference may encode now.
        self._credit = float(FIRST_CHECKED)
        self._first_documents = True
        for text in hard_texts(reference):
            self._compare(text, self._ids(text), 0)

    def surroundings(self) -> tuple[list[int], list[int]]:
        return self._prefix, self._suffix

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        left = [index for index, text in enumerate(texts) if self._differs_on(text)] if self._differs_on else []
        if not left:
            return self._encode_fast(texts)
        others = sorted(set(range(len(texts))) - set(left))
        try:
            fast = self._encode_fast([texts[index] for index in others])
        except FastTokenizerDiffers as error:
            raise FastTokenizerDiffers(others[error.index], str(error)) from None
        slow = self._reference.encode_flat([texts[index] for index in left])
        lengths = np.zeros(len(texts), np.int64)
        parts = [np.empty(0, np.int32)] * len(texts)
        for places, (ids, counts) in ((others, fast), (left, slow)):
            lengths[places] = counts
            for place, end, count in zip(places, np.cumsum(counts), counts, strict=True):
                parts[place] = ids[end - count : end]
        return np.concatenate(parts), lengths

    def _encode_fast(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        characters = sum(map(len, texts))
        ids, lengths = self._flat(texts, characters)
        self._check(texts, ids, lengths, characters)
        self._encoded += characters
        if self._encoded >= TEXT_BETWEEN_LOADS:
            resident = resident_bytes()
            # Where the system does not tell, it is loaded anew each time.
            if resident is None or self._resident is None or resident - self._resident > LARGEST_GROWTH:
                self._load_library()
        return ids, lengths

    def _load_library(self) -> None:
        # The old one goes before the new one comes.
        self._library: FastLibrary | None = None
        self._library = self._load()
        self._resident, self._encoded = resident_bytes(), 0

    def _flat(self, texts: Sequence[str], characters: int) -> tuple[np.ndarray, np.ndarray]:
        """The library's ids of all texts, int32 [ids], and their lengths, int64 [texts]."""
        assert self._library is not None, "loaded when made"
        if not texts:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        if characters < SHORT_DOCUMENT * len(texts):
            layout = self._library.encode_batch(list(texts), parallel=False).layout
            offsets = np.asarray(layout.offsets.data)
            ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
            lengths = np.diff(offsets)
        else:
            parts = [self._library.encode(text) for text in texts]
            ids = np.concatenate(parts)
            lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ids, lengths = ids.view(np.int32), lengths.astype(np.int64, copy=False)
        if self._suffix:
            ids = np.insert(ids, np.repeat(np.cumsum(lengths), len(self._suffix)), self._suffix * len(texts))
            lengths = lengths + len(self._suffix)
        if self._prefix:
            starts = np.cumsum(lengths) - lengths
            ids = np.insert(ids, np.repeat(starts, len(self._prefix)), self._prefix * len(texts))
            lengths = lengths + len(self._prefix)
        return ids, lengths

    def _ids(self, text: str) -> np.ndarray:
        return self._flat([text], len(text))[0]

    def _check(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, characters: int) -> None:
        """Compare the first documents with the reference, or some at random."""
        if not texts:
            return
        self._credit += CHECKED_SHARE * characters
        ends = np.cumsum(lengths)
        for index in self._chosen(len(texts)):
            text, end = texts[index], int(ends[index])
            if len(text) <= self._credit:
                self._compare(text, ids[end - int(lengths[index]) : end], index)
            else:
                start = self._random.randrange(len(text) - int(self._credit))
                text = text[start : start + int(self._credit)]
                self._compare(text, self._ids(text), index)
            self._credit -= max(len(text), 1)

    def _chosen(self, count: int) -> Iterator[int]:
        """Which documents to check, as long as there is credit: the first in their order, later any."""
        if self._first_documents:
            for index in range(count):
                if self._credit < SHORTEST_EXCERPT:
                    break
                yield index
            self._first_documents = self._credit >= SHORTEST_EXCERPT
        elif self._credit >= SHORTEST_EXCERPT:
            # Not more than there are documents: some may be empty and cost nothing.
            for _ in range(count):
                if self._credit < SHORTEST_EXCERPT:
                    break
                yield self._random.randrange(count)

    def _compare(self, text: str, ids: np.ndarray, index: int) -> None:
        expected = np.array(self._reference.encode(text), np.int32)
        if np.array_equal(ids, expected):
            return
        common = min(len(ids), len(expected))
        different = np.flatnonzero(ids[:common] != expected[:common])
        first = int(different[0]) if different.size else common
        near = self._reference.decode(expected[max(0, first - 5) : first + 10].tolist())
        raise FastTokenizerDiffers(
            index,
            f"{self.fast_library} gives other ids than {self.library}: from token {first} on "
            f"{ids[first : first + 4].tolist()} instead of {expected[first : first + 4].tolist()}, near {near[:80]!r}. "
            f"Use --fast-tokenizer never.",
        )

    def encode(self, text: str) -> list[int]:
        return self._reference.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._reference.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._reference.decode(ids)

    def token_text(self, token_id: int) -> str:
        return self._reference.token_text(token_id)

    def definition(self) -> bytes:
        return self._reference.definition()


def with_fast_library(reference: Tokenizer, choice: str) -> Tokenizer:
    """The tokenizer with gigatoken for `encode_flat`, where that is wanted ("auto", "always", "never") and right.

    In "auto" the reference comes back where it cannot be, its `fast_refusal` saying why.

    Raises:
        ValueError: `choice` is "always", and gigatoken is not installed, does not read this tokenizer, or gives other
            ids.
    """
    if choice == "never":
        return reference
    try:
        gigatoken = find_gigatoken(reference)
        return FastTokenizer(reference, gigatoken.load, gigatoken.name, gigatoken.differs_on)
    except ValueError as error:
        if choice == "always":
            raise ValueError(f"--fast-tokenizer always is not possible: {error}") from None
        reference.fast_refusal = str(error)
        return reference


def resident_bytes() -> int | None:
    """Memory that this process holds, or None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
