"""Samples for BERT: masked words to find again, and whether two texts are in their order, drawn as Megatron draws."""

from dataclasses import dataclass

import numpy as np

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.masked import MaskedDataset, MaskedDatasetSettings, padded
from megallm.data.samples.masking import WordMasking

# The longest run of words that is masked at once.
MAX_WORDS = 3
# Around the sentences: [CLS] first, [SEP] second and [SEP].
NUM_SPECIAL_TOKENS = 3
# Labels of what need not be found.
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class BERTDatasetSettings(MaskedDatasetSettings):
    """As `MaskedDatasetSettings`.

    Attributes:
        next_sentence: samples are pairs of texts, half of them in reverse order, for a second loss that tells which.
            Needs documents that were preprocessed sentence by sentence.

    Raises:
        ValueError: a number is out of its range, or the vocabulary has no [CLS], [SEP], [MASK] or padding token.
    """

    next_sentence: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.special_tokens()

    def special_tokens(self) -> tuple[int, ...]:
        """[CLS], [SEP], [MASK] and padding."""
        return self.vocabulary.require("BERT", "cls", "sep", "mask", "pad")


class BERTDataset(MaskedDataset):
    """Masked samples for BERT (see `MaskedDataset`); names are Megatron's, but for `tokens`, which is its `text`.

    An item is a dict: `tokens` int64 [L], masked; `position_ids` int64 [L]; `types` int64 [L], 0 in the first text with
    its [CLS] and [SEP] and in the padding, 1 in the second; `labels` int64 [L], the true token where one is to be found
    and -1 elsewhere; `loss_mask` float32 [L], 1 there and 0 elsewhere; `padding_mask` int64 [L], 1 where there is no
    padding; `is_random` int64 [], 1 if the two texts are swapped; `truncated` int64 [], 1 if tokens were cut off.

    Of the tokens to be found, 80 of 100 are replaced by [MASK], 10 by a random token of the vocabulary, and 10 stay.
    """

    kind = "bert"

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        first: int,
        last: int,
        num_samples: int | None,
        settings: BERTDatasetSettings,
    ) -> None:
        min_sentences = 2 if settings.next_sentence else 1
        super().__init__(indexed_dataset, first, last, num_samples, settings, NUM_SPECIAL_TOKENS, min_sentences)
        self.settings = settings
        self._masking = WordMasking(settings.vocabulary, settings.masking_probability, MAX_WORDS, geometric=False)

    def _make_sample(
        self, tokens: np.ndarray, sentence_lengths: np.ndarray, target_length: int, generator: np.random.RandomState
    ) -> dict[str, np.ndarray]:
        cls_id, sep_id, _, pad_id = self.settings.special_tokens()
        length = self.settings.sequence_length
        first, second, is_swapped = self._pair(tokens, sentence_lengths, generator)
        is_truncated = len(tokens) > target_length
        first, second = truncate_pair(first, second, target_length, generator)
        tokens = np.concatenate([np.array([cls_id]), first, np.array([sep_id])])
        if len(second):
            tokens = np.concatenate([tokens, second, np.array([sep_id])])
        types = np.arange(len(tokens)) >= len(first) + 2
        masked, is_masked = self._mask(tokens, target_length, generator)
        return {
            "tokens": padded(masked, length, pad_id),
            "position_ids": np.arange(length, dtype=np.int64),
            "types": padded(types, length, 0),
            "labels": padded(np.where(is_masked, tokens, NO_LABEL), length, NO_LABEL),
            "is_random": np.array(is_swapped, np.int64),
            "padding_mask": padded(np.ones(len(tokens)), length, 0),
            "loss_mask": padded(is_masked, length, 0).astype(np.float32),
            "truncated": np.array(is_truncated, np.int64),
        }

    def _pair(
        self, tokens: np.ndarray, sentence_lengths: np.ndarray, generator: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Two texts, and whether they are swapped. Without next sentences all is one text, and the second one empty."""
        if not self.settings.next_sentence:
            return tokens, tokens[:0], False
        num_sentences = len(sentence_lengths)
        pivot = int(generator.randint(1, num_sentences)) if num_sentences > 2 else 1
        cut = int(sentence_lengths[:pivot].sum(dtype=np.int64))
        is_swapped = generator.random_sample() < 0.5
        return (tokens[cut:], tokens[:cut], True) if is_swapped else (tokens[:cut], tokens[cut:], False)

    def _mask(
        self, tokens: np.ndarray, target_length: int, generator: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens with replacements int64 [n], and where one must be found, bool [n]."""
        _, _, mask_id, _ = self.settings.special_tokens()
        masked, is_masked = tokens.copy(), np.zeros(len(tokens), bool)
        for run in self._masking.runs(tokens, target_length, generator):
            is_masked[run] = True
            for position in run.tolist():
                if generator.random_sample() < 0.8:
                    masked[position] = mask_id
                elif generator.random_sample() >= 0.5:
                    masked[position] = generator.randint(0, self.settings.vocabulary.vocab_size)
        return masked, is_masked


def truncate_pair(
    first: np.ndarray, second: np.ndarray, target_length: int, generator: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Take tokens off the longer text (the second one of equals), one after another from a random end of it, until both
    together have `target_length`."""
    excess = max(0, len(first) + len(second) - target_length)
    # First token that is kept, and the one behind the last.
    begin, end = [0, 0], [len(first), len(second)]
    for is_front in (generator.random_sample(excess) < 0.5).tolist():
        longer = 0 if end[0] - begin[0] > end[1] - begin[1] else 1
        if is_front:
            begin[longer] += 1
        else:
            end[longer] -= 1
    return first[begin[0] : end[0]], second[begin[1] : end[1]]
