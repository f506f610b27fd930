"""Samples for T5: runs of words taken out of a text, to be written by the decoder, drawn as Megatron draws."""

from dataclasses import dataclass

import numpy as np

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.masked import MaskedDataset, MaskedDatasetSettings, padded
from megallm.data.samples.masking import WordMasking

# The longest run of words that is taken out at once.
MAX_WORDS = 10
# Places that a sample leaves free. They are Megatron's, and with them the order of the samples.
NUM_SPECIAL_TOKENS = 2
# Labels of the padding.
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class T5DatasetSettings(MaskedDatasetSettings):
    """As `MaskedDatasetSettings`; `sequence_length` is the encoder's.

    Attributes:
        decoder_sequence_length: tokens of the decoder's input and labels.

    Raises:
        ValueError: a number is out of its range, a full sample cannot fit the decoder, or the vocabulary has no
            beginning, end or padding token, or no sentinels.
    """

    decoder_sequence_length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.special_tokens()
        if not self.vocabulary.sentinel_ids:
            raise ValueError(
                "The vocabulary has no sentinel tokens, which T5 needs: give --vocab-extra-ids, 100 for example."
            )
        # Even if all that is masked is one run, it stands behind a beginning and a sentinel.
        needed = self.max_masked() + 2
        if self.decoder_sequence_length < needed:
            raise ValueError(
                f"The decoder's sequence length is {self.decoder_sequence_length}, but of {self.sequence_length} "
                f"tokens up to {self.max_masked()} are masked at a probability of {self.masking_probability:g}, and go "
                f"there with a beginning and a sentinel for each run: it must be {needed} at least, and "
                f"{2 * self.max_masked() + 1} is always enough."
            )

    def special_tokens(self) -> tuple[int, ...]:
        """Beginning, end and padding."""
        return self.vocabulary.require("T5", "bos", "eos", "pad")

    def max_masked(self) -> int:
        """The most tokens of a sample that are masked."""
        return int((self.sequence_length - NUM_SPECIAL_TOKENS) * self.masking_probability)


class T5Dataset(MaskedDataset):
    """Samples with runs of words taken out, for T5 (see `MaskedDataset`); names are Megatron's.

    An item is a dict: `text_enc` int64 [L], the text with a sentinel in the place of each run; `text_dec` int64 [M],
    the beginning, then each sentinel with its run; `labels` int64 [M], the same one place earlier, then the end, and
    -1 in the padding; `loss_mask` float32 [M], 1 where there is a label; `enc_mask` int64 [L] and `dec_mask` int64 [M],
    1 where there is no padding; `truncated` int64 [], 1 if tokens were cut off. M is the decoder's sequence length.

    Raises:
        ValueError: see `MaskedDataset`; also (on access) a sample has more runs than there are sentinels, or more
            tokens for the decoder than its sequence length.
    """

    kind = "t5"

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        first: int,
        last: int,
        num_samples: int | None,
        settings: T5DatasetSettings,
    ) -> None:
        super().__init__(indexed_dataset, first, last, num_samples, settings, NUM_SPECIAL_TOKENS, min_sentences=1)
        self.settings = settings
        self._masking = WordMasking(settings.vocabulary, settings.masking_probability, MAX_WORDS, geometric=True)

    def _make_sample(
        self, tokens: np.ndarray, sentence_lengths: np.ndarray, target_length: int, generator: np.random.RandomState
    ) -> dict[str, np.ndarray]:
        bos_id, eos_id, pad_id = self.settings.special_tokens()
        is_truncated = len(tokens) > target_length
        tokens = tokens[:target_length]
        runs = sorted(self._masking.runs(tokens, target_length, generator), key=lambda run: int(run[0]))
        self._check_room(runs)
        encoder, decoder = self._take_out(tokens, runs)
        length, decoder_length = self.settings.sequence_length, self.settings.decoder_sequence_length
        # The labels are the input one place earlier, with the end instead of the beginning.
        dec_mask = padded(np.ones(len(decoder) + 1), decoder_length, 0)
        return {
            "text_enc": padded(encoder, length, pad_id),
            "text_dec": padded(np.append(bos_id, decoder), decoder_length, pad_id),
            "labels": padded(np.append(decoder, eos_id), decoder_length, NO_LABEL),
            "loss_mask": dec_mask.astype(np.float32),
            "truncated": np.array(is_truncated, np.int64),
            "enc_mask": padded(np.ones(len(encoder)), length, 0),
            "dec_mask": dec_mask,
        }

    def _take_out(self, tokens: np.ndarray, runs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The text with sentinels instead of its runs, and the sentinels with their runs: int64 [n] each."""
        kept, taken, behind = [], [], 0
        for run, sentinel_id in zip(runs, self.settings.vocabulary.sentinel_ids, strict=False):
            sentinel = np.array([sentinel_id])
            kept += [tokens[behind : run[0]], sentinel]
            taken += [sentinel, tokens[run]]
            behind = int(run[-1]) + 1
        # What is empty is still a list of integers.
        return np.concatenate([*kept, tokens[behind:]]), np.concatenate([tokens[:0], *taken])

    def _check_room(self, runs: list[np.ndarray]) -> None:
        settings = self.settings
        num_sentinels = len(settings.vocabulary.sentinel_ids)
        # The beginning, then each run behind its sentinel.
        num_decoder_tokens = 1 + sum(1 + len(run) for run in runs)
        if len(runs) > num_sentinels:
            raise ValueError(
                f"A sample has {len(runs)} masked runs, but the vocabulary has {num_sentinels} sentinel tokens; "
                f"--vocab-extra-ids {settings.max_masked()} is always enough."
            )
        if num_decoder_tokens > settings.decoder_sequence_length:
            raise ValueError(
                f"A sample has {num_decoder_tokens} tokens for the decoder, but its sequence length is "
                f"{settings.decoder_sequence_length}; {2 * settings.max_masked() + 1} is always enough."
            )
