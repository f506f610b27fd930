"""Samples that need no files and that a model can learn from: for tests, measurements and first steps."""

from collections.abc import Sequence

import numpy as np

from megallm.data.samples.masked import stacked

LONGEST_PERIOD = 32
NOISE_EVERY = 16


class MockDataset:
    """Noisy repeating patterns of tokens; sample `index` depends on `seed` and `index` alone.

    A sample repeats a random pattern of 1 to 32 tokens, of which one position in sixteen is replaced at random. Small
    token ids are more frequent than large ones (their number of digits is uniform). So the loss falls at first, from
    the frequencies, and again later, from copying. Give training, validation and test data different seeds: equal seeds
    give equal samples.

    An item has `tokens` and `labels` int64 [L], `loss_mask` float32 [L] of ones, `position_ids` int64 [L].

    Raises:
        ValueError: an argument is below what makes sense.
    """

    def __init__(self, num_samples: int, sequence_length: int, vocab_size: int, seed: int) -> None:
        for name, value, least in [
            ("number of samples", num_samples, 0),
            ("sequence length", sequence_length, 1),
            ("vocabulary size", vocab_size, 1),
            ("seed", seed, 0),
        ]:
            if value < least:
                raise ValueError(f"The {name} of mock data is {value}, but must be {least} at least.")
        self._num_samples, self._sequence_length, self._vocab_size, self._seed = (
            num_samples,
            sequence_length,
            vocab_size,
            seed,
        )

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"The mock data has samples 0 to {len(self) - 1}, not {index}.")
        # Raw integers alone: numpy may change its other draws from version to version, and floats depend on the
        # machine.
        source = np.random.Philox(key=[self._seed, index])
        length = self._sequence_length + 1
        pattern = self._draw(source, 1 + int(source.random_raw()) % LONGEST_PERIOD)
        is_noise = source.random_raw(length) % np.uint64(NOISE_EVERY) == 0
        text = np.where(is_noise, self._draw(source, length), np.resize(pattern, length))
        return {
            "tokens": text[:-1].copy(),
            "labels": text[1:].copy(),
            "loss_mask": np.ones(self._sequence_length, np.float32),
            "position_ids": np.arange(self._sequence_length, dtype=np.int64),
        }

    def get_batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Several samples at once: each array of an item with a leading dim [n]."""
        return stacked([self[int(index)] for index in indices])

    def _draw(self, source: np.random.Philox, count: int) -> np.ndarray:
        """Random tokens int64 [count]: first the number of binary digits, then one of the numbers that have them."""
        raw = source.random_raw(count)
        digits = raw % np.uint64(self._vocab_size.bit_length())
        lowest = (np.uint64(1) << digits) - np.uint64(1)
        return ((lowest + (raw >> np.uint64(8) & lowest)) % np.uint64(self._vocab_size)).astype(np.int64)


class MockMaskedDataset:
    """Pairs of such patterns with some tokens masked, as a BERT reads them; the arguments are those of `MockDataset`.

    The second half of a sample goes on with the pattern of the first one, or (in every second sample, by chance) has
    another. So both losses fall: what is masked stands elsewhere too, and the halves are alike or not. The last eighth
    of every fourth sample is padding. The highest token is the mask.

    An item has what one of `BERTDataset` has, without `truncated`.

    Raises:
        ValueError: as `MockDataset`, or there is no token beside the mask.
    """

    def __init__(
        self, num_samples: int, sequence_length: int, vocab_size: int, seed: int, masking_probability: float
    ) -> None:
        if vocab_size < 2:
            raise ValueError(f"The vocabulary size of masked mock data is {vocab_size}, but must be 2 at least.")
        self._texts = MockDataset(2 * num_samples, sequence_length, vocab_size - 1, seed)
        self._mask_id, self._seed, self._sequence_length = vocab_size - 1, seed, sequence_length
        # Of 2^16 equally likely numbers.
        self._threshold = round(masking_probability * 2**16)

    def __len__(self) -> int:
        return len(self._texts) // 2

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"The mock data has samples 0 to {len(self) - 1}, not {index}.")
        length, half = self._sequence_length, self._sequence_length // 2
        # No seed of texts is as large: their numbers are others.
        source = np.random.Philox(key=[self._seed + 2**33, index])
        choices = int(source.random_raw())
        is_random, is_padded = choices % 2, (choices >> 1) % 4 == 0
        text = self._texts[2 * index]["tokens"]
        if is_random:
            text = np.concatenate([text[:half], self._texts[2 * index + 1]["tokens"][half:]])
        positions = np.arange(length, dtype=np.int64)
        is_text = positions < length - (length // 8 if is_padded else 0)
        # The first token stands for both texts, and stays.
        is_masked = (source.random_raw(length) % np.uint64(2**16) < self._threshold) & is_text & (positions > 0)
        return {
            "tokens": np.where(is_text, np.where(is_masked, self._mask_id, text), 0),
            "position_ids": positions,
            "types": (is_text & (positions >= half)).astype(np.int64),
            "labels": np.where(is_masked, text, -1),
            "is_random": np.array(is_random, np.int64),
            "padding_mask": is_text.astype(np.int64),
            "loss_mask": is_masked.astype(np.float32),
        }

    def get_batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Several samples at once: each array of an item with a leading dim [n]."""
        return stacked([self[int(index)] for index in indices])
