"""Samples of a fixed length for language models, cut from documents in exactly Megatron's order."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples import helpers, index_cache

# A last epoch of which less than this share is used is shuffled apart from the others, so that they are all seen whole
# before it.
SEPARATE_EPOCH_THRESHOLD = 0.80
# Stands for "no token is padding".
NO_PADDING = -1
# Raised when the meaning of what is cached changes.
CACHE_VERSION = 1


@dataclass(frozen=True)
class GPTDatasetSettings:
    """What all datasets of a run share.

    Attributes:
        sequence_length: tokens of a sample.
        seed: of the order of documents and samples; the same for every split.
        vocab_size: token ids must be below it; None skips the check.
        eod_id: the token that ends a document.
        pad_id: the token that fills up; where it is a label, the loss is masked. None, or equal to `eod_id`: no token
            is padding.
        reset_position_ids: positions start again after each end of a document.
        reset_attention_mask: samples carry `document_ids`, so that attention stays within documents.
        eod_mask_loss: no loss where the input token is `eod_id`.
        cache_path: folder for the indices; None builds them in memory in every process.
        data_path, split: see `build_train_valid_test_datasets`.
    """

    sequence_length: int
    seed: int = 1234
    vocab_size: int | None = None
    eod_id: int | None = None
    pad_id: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    cache_path: str | None = None
    data_path: tuple[str, ...] = ()
    split: str = "969, 30, 1"

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"The sequence length is {self.sequence_length}, but must be 1 at least.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"The seed of the data order is {self.seed}, but must be in 0 to {2**32 - 1}.")
        needs_eod = {
            "reset_position_ids": self.reset_position_ids,
            "reset_attention_mask": self.reset_attention_mask,
            "eod_mask_loss": self.eod_mask_loss,
        }
        if self.eod_id is None and any(needs_eod.values()):
            asked = ", ".join(name for name, value in needs_eod.items() if value)
            raise ValueError(f"{asked} needs to know the token that ends a document, and the tokenizer has none.")


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are read for a number of samples.

    Attributes: `num_epochs`; `num_samples` in all epochs together; `num_samples_before_last`, those that are shuffled
    apart from the last epoch's, or None when all are shuffled together.
    """

    num_epochs: int
    num_samples: int
    num_samples_before_last: int | None


def plan_epochs(num_tokens: int, sequence_length: int, num_samples: int | None) -> EpochPlan:
    """The smallest number of epochs of `num_tokens` that gives `num_samples` (one epoch for None).

    Each sample takes `sequence_length` tokens, and the last one needs one token more, for its last label.
    """
    assert num_tokens > 0, "a dataset without tokens has no epochs"
    wanted = 0 if num_samples is None else num_samples * sequence_length + 1
    num_epochs = max(1, -(-wanted // num_tokens))
    total = (num_epochs * num_tokens - 1) // sequence_length
    if num_epochs == 1 or num_samples is None:
        return EpochPlan(1, total, None)
    before_last = ((num_epochs - 1) * num_tokens - 1) // sequence_length
    per_epoch = (num_tokens - 1) // sequence_length
    from_last = num_samples - before_last
    assert 0 <= from_last <= per_epoch + 1, "the number of epochs is not the smallest one"
    is_separate = from_last < int(SEPARATE_EPOCH_THRESHOLD * per_epoch)
    return EpochPlan(num_epochs, total, before_last if is_separate else None)


def build_sample_order(
    sequence_lengths: np.ndarray, first: int, last: int, sequence_length: int, num_samples: int | None, seed: int
) -> dict[str, np.ndarray]:
    """Megatron's three indices over sequences `first` to `last - 1`.

    Returns:
        `document_index` int32 [epochs * (last - first)], the sequences in the order in which they are read;
        `sample_index` [samples + 1, 2], where each sample starts (see `helpers.build_sample_index`); `shuffle_index`
        uint32 or int64 [samples], the order of the samples.
    """
    num_tokens = int(sequence_lengths[first:last].sum(dtype=np.int64))
    plan = plan_epochs(num_tokens, sequence_length, num_samples)
    # Up to four shuffles draw from one generator, whose stream numpy has frozen; their order fixes the result.
    generator = np.random.RandomState(seed)
    documents = np.arange(first, last, dtype=np.int32)
    separate = plan.num_samples_before_last is not None
    document_index = np.tile(documents, plan.num_epochs - separate)
    generator.shuffle(document_index)
    if separate:
        generator.shuffle(documents)
        document_index = np.concatenate([document_index, documents])
    wide = len(document_index) > np.iinfo(np.int32).max
    sample_index = helpers.build_sample_index(sequence_lengths, document_index, sequence_length, plan.num_samples, wide)

    dtype = np.int64 if plan.num_samples >= np.iinfo(np.uint32).max - 1 else np.uint32
    boundary = plan.num_samples if plan.num_samples_before_last is None else plan.num_samples_before_last
    shuffle_index = np.arange(plan.num_samples, dtype=dtype)
    # Slices of one array are shuffled in place, with the draws that arrays of their own would take.
    generator.shuffle(shuffle_index[:boundary])
    if separate:
        generator.shuffle(shuffle_index[boundary:])
    return {"document_index": document_index, "sample_index": sample_index, "shuffle_index": shuffle_index}


class GPTDataset:
    """Samples of `settings.sequence_length` tokens from sequences `first` to `last - 1` of an indexed dataset.

    `len()` is the number of samples that can be asked for: at least `num_samples`, all those of the last epoch begun.
    An item is a dict: `tokens` and `labels` int64 [L], `loss_mask` float32 [L], `position_ids` int64 [L], and with
    `reset_attention_mask` `document_ids` int64 [L], which counts the documents of the sample from 0: a token may attend
    to those of its own number.

    Attributes: `document_index`, `sample_index`, `shuffle_index` (see `build_sample_order`).

    Raises:
        ValueError: the range holds no tokens, or (on access) a token is not below the vocabulary's size.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        first: int,
        last: int,
        num_samples: int | None,
        settings: GPTDatasetSettings,
    ) -> None:
        assert 0 <= first <= last <= len(indexed_dataset), (
            f"sequences {first} to {last} are not within {len(indexed_dataset)}"
        )
        self.settings = settings
        self._indexed_dataset = indexed_dataset
        lengths = indexed_dataset.sequence_lengths
        length = settings.sequence_length
        num_tokens = int(lengths[first:last].sum(dtype=np.int64))
        if num_tokens == 0:
            raise ValueError(
                f"{indexed_dataset.path_prefix} has no tokens in sequences {first} to {last - 1} of {len(lengths)}."
            )
        if plan_epochs(num_tokens, length, num_samples).num_samples == 0:
            raise ValueError(
                f"{indexed_dataset.path_prefix} has {num_tokens} tokens in sequences {first} to {last - 1} of "
                f"{len(lengths)}, too few for one sample of {length} tokens and the one that follows; "
                f"a sequence length of {max(1, num_tokens - 1)} fits."
            )

        def build() -> dict[str, np.ndarray]:
            return build_sample_order(lengths, first, last, length, num_samples, settings.seed)

        if settings.cache_path is None:
            arrays = build()
        else:
            arrays = index_cache.load_or_build(
                Path(settings.cache_path), self._cache_key(first, last, num_samples), build
            )
        self.document_index = arrays["document_index"]
        self.sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]
        pad_id = settings.pad_id
        self._pad_id = NO_PADDING if pad_id is None or pad_id == settings.eod_id else pad_id

    def _cache_key(self, first: int, last: int, num_samples: int | None) -> str:
        """Digest of all that the indices depend on; of the dataset, that is the lengths of its sequences."""
        settings = self.settings
        lengths = np.ascontiguousarray(self._indexed_dataset.sequence_lengths)
        content = {
            "version": CACHE_VERSION,
            "sequence_lengths": hashlib.blake2b(lengths.data).hexdigest(),
            "range": [first, last],
            "num_samples": num_samples,
            "sequence_length": settings.sequence_length,
            "seed": settings.seed,
        }
        return "gpt" + hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=20).hexdigest()

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"The dataset has samples 0 to {len(self) - 1}, not {index}.")
        text = self._text(int(self.shuffle_index[index]))
        vocab_size = self.settings.vocab_size
        if text.min() < 0 or (vocab_size is not None and text.max() >= vocab_size):
            wrong = int(text.min()) if text.min() < 0 else int(text.max())
            limit = "negative" if wrong < 0 else f"not below the vocabulary size {vocab_size}"
            raise ValueError(
                f"Token {wrong} in {self._indexed_dataset.path_prefix} is {limit}: "
                f"the data was made with another tokenizer than this run's."
            )
        return make_sample(text, self.settings, self._pad_id)

    def _text(self, sample: int) -> np.ndarray:
        """Tokens of a sample and the one that follows, int64 [L + 1]."""
        position, offset = (int(number) for number in self.sample_index[sample])
        text = np.empty(self.settings.sequence_length + 1, np.int64)
        filled = 0
        while filled < len(text):
            document = int(self.document_index[position])
            available = int(self._indexed_dataset.sequence_lengths[document]) - offset
            count = min(available, len(text) - filled)
            text[filled : filled + count] = self._indexed_dataset.get(document, offset, count)
            filled += count
            position, offset = position + 1, 0
        return text


def make_sample(text: np.ndarray, settings: GPTDatasetSettings, pad_id: int = NO_PADDING) -> dict[str, np.ndarray]:
    """Inputs, labels, mask and positions from `text`, int64 [L + 1]; the result is described at `GPTDataset`.

    Padding is masked where it is the label, and then replaced by token 0, which every embedding has.
    """
    tokens, labels = text[:-1].copy(), text[1:].copy()
    is_eod = tokens == settings.eod_id if settings.eod_id is not None else np.zeros(len(tokens), bool)
    loss_mask = np.ones(len(tokens), np.float32)
    if settings.eod_mask_loss:
        loss_mask[is_eod] = 0.0
    loss_mask[labels == pad_id] = 0.0
    sample = {
        "tokens": np.where(tokens == pad_id, 0, tokens),
        "labels": np.where(labels == pad_id, 0, labels),
        "loss_mask": loss_mask,
        "position_ids": np.arange(len(tokens), dtype=np.int64),
    }
    if settings.reset_position_ids:
        sample["position_ids"] -= _document_starts(is_eod)
    if settings.reset_attention_mask:
        # A document's end belongs to it: the number rises behind it.
        sample["document_ids"] = np.cumsum(is_eod, dtype=np.int64) - is_eod
    return sample


def _document_starts(is_eod: np.ndarray) -> np.ndarray:
    """First position of the document of each token: int64 [L]."""
    starts = np.zeros(len(is_eod), np.int64)
    starts[1:][is_eod[:-1]] = np.flatnonzero(is_eod[:-1]) + 1
    return np.maximum.accumulate(starts)
