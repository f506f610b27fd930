"""Which tokens of a sample a model must find again: whole words and runs of words, drawn exactly as Megatron draws."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from megallm.data.tokenizer.base import Tokenizer

# How WordPiece writes a token that continues a word.
CONTINUATION = "##"
# Chance that a run ends after each of its words, where lengths are geometric: Joshi et al., "SpanBERT"
# (arXiv 1907.10529), section 3.1.
GEOMETRIC_PROBABILITY = 0.2


@dataclass(frozen=True)
class MaskingVocabulary:
    """What masking needs to know of a tokenizer.

    Attributes:
        vocab_size: every id is below it; random replacements are drawn from all of them.
        cls_id, sep_id: tokens that are never masked.
        mask_id, pad_id, bos_id, eos_id: further special tokens; None where there is no such token.
        sentinel_ids: tokens that stand for masked runs, the first one for the first run.
        continuation_ids: tokens that continue the word of the token before them: those whose text begins with ## in a
            WordPiece vocabulary. Without any, each token is a word.

    Raises:
        ValueError: an id is not below the size.
    """

    vocab_size: int
    cls_id: int | None = None
    sep_id: int | None = None
    mask_id: int | None = None
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    sentinel_ids: tuple[int, ...] = ()
    continuation_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            ids = value if isinstance(value, tuple | frozenset) else () if value is None else (value,)
            wrong = next((token for token in ids if not 0 <= token < self.vocab_size), None)
            if wrong is not None:
                raise ValueError(
                    f"{field.name} of the vocabulary has token {wrong}, but tokens are 0 to {self.vocab_size - 1}."
                )

    def require(self, purpose: str, *names: str) -> tuple[int, ...]:
        """The special tokens of some names, without the `_id` of the attributes.

        Raises:
            ValueError: there is no such token.
        """
        found = {name: getattr(self, f"{name}_id") for name in names}
        missing = [name for name, token in found.items() if token is None]
        if missing:
            raise ValueError(
                f"The vocabulary has no {' and no '.join(missing)} token, which {purpose} needs: "
                "take a tokenizer that has one, such as BertWordPieceLowerCase."
            )
        return tuple(found.values())


def masking_vocabulary(tokenizer: Tokenizer) -> MaskingVocabulary:
    """What masking needs to know of a tokenizer; its end of document is the end of a text."""
    return MaskingVocabulary(
        vocab_size=tokenizer.vocab_size,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eod_id,
        sentinel_ids=tuple(tokenizer.sentinel_ids),
        continuation_ids=frozenset(
            token for token in range(tokenizer.vocab_size) if tokenizer.token_text(token).startswith(CONTINUATION)
        ),
    )


class WordMasking:
    """Draws the words to mask.

    Args:
        vocabulary: tells words apart.
        probability: share of a sample's tokens that is masked.
        max_words: the longest run of words.
        geometric: a run's number of words is geometric with mean 5, cut at `max_words`; otherwise the chance of n words
            is in proportion to 1 / n.
    """

    def __init__(self, vocabulary: MaskingVocabulary, probability: float, max_words: int, geometric: bool) -> None:
        self._probability, self._max_words, self._geometric = probability, max_words, geometric
        self._is_special = np.zeros(vocabulary.vocab_size, bool)
        self._is_special[[token for token in (vocabulary.cls_id, vocabulary.sep_id) if token is not None]] = True
        self._is_continuation = np.zeros(vocabulary.vocab_size, bool)
        self._is_continuation[sorted(vocabulary.continuation_ids)] = True
        # Normalised as often as Megatron and numpy's `choice` do it: a bound may depend on the rounding.
        chances = 1.0 / np.arange(1, max_words + 1)
        for _ in range(2):
            chances = chances / chances.sum()
        bounds = chances.cumsum()
        self._bounds = (bounds / bounds[-1]).tolist()

    def limit(self, num_tokens: int, target_length: int) -> float:
        """The most tokens that may be masked in a sample of `num_tokens` that was to have `target_length`."""
        return min(self._probability * target_length, max(1, round(num_tokens * self._probability)))

    def runs(self, tokens: np.ndarray, target_length: int, generator: np.random.RandomState) -> Iterator[np.ndarray]:
        """Positions int64 [n] of the tokens of one masked run after another, in the order in which they are drawn.

        A run that would exceed the limit is shortened word by word, and left out if it overlaps an earlier one. Runs
        are drawn while they are asked for: what the caller draws between two of them is part of the order of draws.

        Args:
            tokens: int64 [length], below the vocabulary's size.
            target_length: see `limit`.
            generator: of this sample.
        """
        positions = np.flatnonzero(~self._is_special[tokens])
        begins_word = ~self._is_continuation[tokens[positions]]
        begins_word[:1] = True
        # Where each word starts in `positions`, and where the last one ends.
        starts = [*np.flatnonzero(begins_word).tolist(), len(positions)]
        num_words = len(starts) - 1
        order = np.arange(num_words)
        generator.shuffle(order)

        limit, masked = self.limit(len(tokens), target_length), 0
        is_masked = np.zeros(len(tokens), bool)
        for word in order.tolist():
            # Megatron draws on where a fraction of a token is left, but nothing fits it, and nothing is drawn later.
            if masked + 1 > limit:
                return
            words = self._draw_words(generator)
            first = starts[word]
            while words and masked + starts[min(word + words, num_words)] - first > limit:
                words -= 1
            run = positions[first : starts[min(word + words, num_words)]]
            if words == 0 or is_masked[run].any():
                continue
            is_masked[run] = True
            masked += len(run)
            yield run

    def _draw_words(self, generator: np.random.RandomState) -> int:
        if self._geometric:
            return min(generator.geometric(GEOMETRIC_PROBABILITY), self._max_words)
        return bisect_right(self._bounds, generator.random_sample()) + 1
