"""What the datasets of masked language models share: samples of whole sentences, drawn exactly as Megatron draws."""

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples import index_cache
from megallm.data.samples.gpt import TooFewTokensError
from megallm.data.samples.masking import MaskingVocabulary
from megallm.data.samples.sentence_mapping import build_sentence_mapping, short_ratio, why_empty

# Raised when the meaning of what is cached changes.
CACHE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MaskedDatasetSettings:
    """What all masked datasets of a run share.

    Attributes:
        sequence_length: tokens of a sample, special tokens included.
        vocabulary: special tokens, and which tokens continue a word.
        seed: of the samples' lengths and order and of the masks; the same for every split.
        masking_probability: share of the tokens that is masked, above 0 and below 1.
        short_sequence_probability: share of the samples that are cut at a random length, 0 to 1.
        cache_path: folder for the indices; None builds them in memory in every process.
    """

    sequence_length: int
    vocabulary: MaskingVocabulary
    seed: int = 1234
    masking_probability: float = 0.15
    short_sequence_probability: float = 0.1
    cache_path: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"The seed of the data order is {self.seed}, but must be in 0 to {2**32 - 1}.")
        if not 0 < self.masking_probability < 1:
            raise ValueError(f"The masking probability is {self.masking_probability:g}, but must be between 0 and 1.")
        if not 0 <= self.short_sequence_probability <= 1:
            raise ValueError(
                f"The probability of short sequences is {self.short_sequence_probability:g}, but must be 0 to 1."
            )


class MaskedDataset(ABC):
    """Samples of whole sentences from documents `first` to `last - 1` of an indexed dataset, whose sequences they are.

    `len()` is the number of samples that can be asked for: at least `num_samples`, all those of the last epoch begun
    (one epoch for None). What is masked in a sample depends on the seed and on its number alone.

    Attributes: `sample_index`, uint32 or int64 [samples, 3] (see `sentence_mapping.build_sentence_mapping`);
    `indexed_dataset` and its `path_prefix`; `build_seconds`, what building the index took, None where it was found.

    Args:
        num_special_tokens: those that are put around the sentences.
        min_sentences: sentences that a sample must have.

    Raises:
        TooFewTokensError: no document of the range can be used.
        ValueError: nothing of a sequence this short would be masked, or (on access) a token is not below the
            vocabulary's size.
    """

    kind: str  # of the entries in the index cache

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        first: int,
        last: int,
        num_samples: int | None,
        settings: MaskedDatasetSettings,
        num_special_tokens: int,
        min_sentences: int,
    ) -> None:
        num_documents = self.num_elements(indexed_dataset)
        assert 0 <= first <= last <= num_documents, f"documents {first} to {last} are not within {num_documents}"
        max_length = settings.sequence_length - num_special_tokens
        if max_length * settings.masking_probability < 1:
            needed = math.ceil(1 / settings.masking_probability) + num_special_tokens
            raise ValueError(
                f"The sequence length is {settings.sequence_length}, which leaves {max(0, max_length)} tokens beside "
                f"{num_special_tokens} special ones: too few to mask one of them at a probability of "
                f"{settings.masking_probability:g}; it must be {needed} at least."
            )
        self.indexed_dataset, self._seed = indexed_dataset, settings.seed
        self.path_prefix = indexed_dataset.path_prefix
        self.build_seconds: float | None = None
        self._vocab_size = settings.vocabulary.vocab_size
        bounds = np.asarray(indexed_dataset.document_indices[first : last + 1])
        lengths = indexed_dataset.sequence_lengths
        probability = settings.short_sequence_probability

        def build() -> dict[str, np.ndarray]:
            begin = time.perf_counter()
            rows = build_sentence_mapping(
                bounds, lengths, num_samples, max_length, probability, settings.seed, min_sentences
            )
            self.build_seconds = time.perf_counter() - begin
            return {"sample_index": rows}

        if settings.cache_path is None:
            arrays = build()
        else:
            file = indexed_dataset.idx_path, indexed_dataset.idx_status
            content = {
                "version": CACHE_VERSION,
                "documents": [first, last],
                "document_indices": index_cache.content_hash(*file, "documents", indexed_dataset.document_indices),
                "sequence_lengths": index_cache.content_hash(*file, "lengths", lengths),
                "num_samples": num_samples,
                "max_length": max_length,
                "short_ratio": short_ratio(probability),
                "seed": settings.seed,
                "min_sentences": min_sentences,
            }
            digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=20).hexdigest()
            arrays = index_cache.load_or_build(Path(settings.cache_path), self.kind + digest, build)
        self.sample_index = arrays["sample_index"]
        if len(self.sample_index) == 0:
            raise TooFewTokensError(
                f"{indexed_dataset.path_prefix} gives no samples from documents {first} to {last - 1} of "
                f"{num_documents}: {why_empty(bounds, np.asarray(lengths), min_sentences)}."
            )

    @staticmethod
    def num_elements(indexed_dataset: IndexedDataset) -> int:
        """What splits are shares of: documents, so that none is cut in two."""
        return indexed_dataset.num_documents

    def __len__(self) -> int:
        return len(self.sample_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"The dataset has samples 0 to {len(self) - 1}, not {index}.")
        first, last, target_length = (int(number) for number in self.sample_index[index])
        tokens, lengths = self._read(first, last)
        generator = np.random.RandomState((self._seed + int(index)) % 2**32)
        return self._make_sample(tokens, lengths, target_length, generator)

    def _read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [n] of sentences `first` to `last - 1`, and the length of each of these, int32."""
        dataset = self.indexed_dataset
        dataset.check_size()
        lengths = np.asarray(dataset.sequence_lengths[first:last])
        # Sentences of one document lie back to back in the file.
        start = int(dataset.sequence_offsets[first]) // dataset.dtype.itemsize
        tokens = dataset.read_tokens(start, start + int(lengths.sum(dtype=np.int64))).astype(np.int64)
        self._check_tokens(tokens)
        return tokens, lengths

    def get_batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Several samples at once, one at least: each array of an item with a leading dim [n]."""
        return stacked([self[int(index)] for index in indices])

    @abstractmethod
    def _make_sample(
        self, tokens: np.ndarray, sentence_lengths: np.ndarray, target_length: int, generator: np.random.RandomState
    ) -> dict[str, np.ndarray]:
        """An item from the tokens of its sentences, int64 [n], which may be more than `target_length`."""

    def _check_tokens(self, tokens: np.ndarray) -> None:
        """Refuse tokens that the vocabulary does not have."""
        if len(tokens) == 0 or (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            return
        wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        limit = "negative" if wrong < 0 else f"not below the vocabulary size {self._vocab_size}"
        raise ValueError(
            f"Token {wrong} in {self.path_prefix} is {limit}: the data was made with another tokenizer than this run's."
        )


def stacked(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Each array of the samples, one at least, with a leading dim [n]."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def padded(tokens: Sequence[int] | np.ndarray, length: int, padding: int) -> np.ndarray:
    """int64 [length], filled up with `padding`."""
    result = np.full(length, padding, np.int64)
    result[: len(tokens)] = tokens
    return result
