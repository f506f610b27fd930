"""Samples of a fixed length for language models, cut from documents in exactly Megatron's order."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples import index_cache
from megallm.data.samples.fetch import Reader, fetch_samples, mark_documents, sample_reader
from megallm.data.samples.open_datasets import OpenDatasets
from megallm.data.samples.order import build_sample_order, plan_epochs

# What fills up where no token is padding.
NO_PADDING = -1
# Samples that are asked for at once, at most.
MOST_SAMPLES = 1 << 20
# Raised when the meaning of what is cached changes.
CACHE_VERSION = 1


class TooFewTokensError(ValueError):
    """A part of a dataset has not enough tokens for one sample."""


@dataclass(frozen=True)
class GPTDatasetSettings:
    """What all datasets of a run share.

    Attributes:
        sequence_length: tokens of a sample.
        seed: of the order of documents and samples; the same for every split.
        vocab_size: token ids must be below it; None skips the check.
        eod_id: the token that ends a document.
        pad_id: the token that fills up; where it is a label, the loss is masked. None, or equal to `eod_id`: no token
            of the data is padding.
        reset_position_ids: positions start again after each end of a document.
        reset_attention_mask: samples carry `document_ids`, so that attention stays within documents.
        eod_mask_loss: no loss where the input token is `eod_id`.
        cache_path: folder for the indices; None builds them in memory in every process.
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

    @cached_property
    def no_mask(self) -> np.ndarray:
        """float32 [MOST_SAMPLES, L], loss masks of samples in which nothing is masked, all one row in memory."""
        return _equal_rows(np.ones(self.sequence_length, np.float32))

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [MOST_SAMPLES, L], positions 0 to L - 1 that do not start again, all one row in memory."""
        return _equal_rows(np.arange(self.sequence_length))


class _Opened(NamedTuple):
    """What a dataset reads from; see `build_sample_order`."""

    indexed_dataset: IndexedDataset
    reader: Reader
    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray


class GPTDataset:
    """Samples of `settings.sequence_length` tokens from sequences `first` to `last - 1` of an indexed dataset.

    `len()` is the number of samples that can be asked for: at least `num_samples`, all those of the last epoch begun.
    An item is a dict: `tokens` and `labels` int64 [L], `loss_mask` float32 [L], `position_ids` int64 [L], and with
    `reset_attention_mask` `document_ids` int64 [L], which counts the documents of the sample from 0: a token may attend
    to those of its own number.

    Attributes: `document_index`, `sample_index`, `shuffle_index` (see `build_sample_order`); `pad_id`, what fills up;
    `path_prefix` of the indexed dataset; `build_seconds`, what building the indices took, None where they were found.

    Args:
        num_samples: the documents are read as many times over as that takes; None reads them once.
        keep_partial: the tokens that are left over at the end are a sample too, filled up with padding.
        open_datasets: closes this dataset when others are used more; None: it stays open.

    Raises:
        TooFewTokensError: the range holds too few tokens.
        ValueError: on access, a token is not below the vocabulary's size, or the file has shrunk since it was opened.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        first: int,
        last: int,
        num_samples: int | None,
        settings: GPTDatasetSettings,
        keep_partial: bool = False,
        open_datasets: OpenDatasets | None = None,
    ) -> None:
        assert 0 <= first <= last <= len(indexed_dataset), (
            f"sequences {first} to {last} are not within {len(indexed_dataset)}"
        )
        self.settings = settings
        self.path_prefix = indexed_dataset.path_prefix
        self.build_seconds: float | None = None
        self._files, self._open_datasets = indexed_dataset.checked_files, open_datasets
        self._range, self._num_samples, self._keep_partial = (first, last), num_samples, keep_partial
        self._check_size(indexed_dataset)
        self._key = "" if settings.cache_path is None else self._cache_key(indexed_dataset)
        self._order: dict[str, np.ndarray] | None = None
        self._opened: _Opened | None = self._with_order(indexed_dataset)
        self._length = len(self._open().shuffle_index)
        pad_id = settings.pad_id
        self.pad_id = NO_PADDING if pad_id is None or pad_id == settings.eod_id else pad_id

    def close(self) -> None:
        """Let go of the files until they are needed again. Indices that no folder keeps stay in memory."""
        self._opened = None

    @property
    def indexed_dataset(self) -> IndexedDataset:
        """What the samples are cut from."""
        return self._open().indexed_dataset

    @property
    def document_index(self) -> np.ndarray:
        return self._open().document_index

    @property
    def sample_index(self) -> np.ndarray:
        return self._open().sample_index

    @property
    def shuffle_index(self) -> np.ndarray:
        return self._open().shuffle_index

    @property
    def num_epochs(self) -> int:
        """How many times over the documents are read."""
        first, last = self._range
        return len(self.document_index) // (last - first)

    def _open(self) -> _Opened:
        """Open what was closed; the caller holds the result while it reads, since another dataset may close this."""
        opened = self._opened
        if opened is None:
            self._opened = opened = self._with_order(self._files.open())
        # Not before it is open: what is closed while it opens, by another thread, would stay open unnoticed.
        if self._open_datasets is not None:
            self._open_datasets.used(self)
        return opened

    def _with_order(self, indexed_dataset: IndexedDataset) -> _Opened:
        """The dataset with its indices: from memory, from the cache, or else built."""
        settings = self.settings

        def build() -> dict[str, np.ndarray]:
            lengths, (first, last) = indexed_dataset.sequence_lengths, self._range
            begin = time.perf_counter()
            order = build_sample_order(
                lengths, first, last, settings.sequence_length, self._num_samples, settings.seed, self._keep_partial
            )
            self.build_seconds = time.perf_counter() - begin
            return order

        if settings.cache_path is not None:
            order = index_cache.load_or_build(Path(settings.cache_path), self._key, build)
        else:
            order = self._order = self._order or build()
        indices = order["document_index"], order["sample_index"], order["shuffle_index"]
        return _Opened(indexed_dataset, sample_reader(indexed_dataset, *indices), *indices)

    def _check_size(self, dataset: IndexedDataset) -> None:
        """Raise ValueError where the range has no sample."""
        (first, last), length = self._range, self.settings.sequence_length
        num_sequences = len(dataset)
        if first == last:
            raise TooFewTokensError(f"{dataset.path_prefix} gives it none of its {num_sequences} sequences.")
        num_tokens = int(dataset.sequence_lengths[first:last].sum(dtype=np.int64))
        place = f"in sequences {first} to {last - 1} of {num_sequences}"
        if num_tokens == 0:
            raise TooFewTokensError(f"{dataset.path_prefix} has no tokens {place}.")
        if plan_epochs(num_tokens, length, self._num_samples, self._keep_partial).num_samples == 0:
            raise TooFewTokensError(
                f"{dataset.path_prefix} has {num_tokens} tokens {place}, too few for one sample of "
                f"{length} tokens and the one that follows; a sequence length of {max(1, num_tokens - 1)} fits."
            )

    def _cache_key(self, dataset: IndexedDataset) -> str:
        """Digest of all that the indices depend on; of the dataset, that is the lengths of its sequences."""
        settings = self.settings
        content = {
            "version": CACHE_VERSION,
            "sequence_lengths": index_cache.content_hash(
                dataset.idx_path, dataset.idx_status, "lengths", dataset.sequence_lengths
            ),
            "range": list(self._range),
            "num_samples": self._num_samples,
            "sequence_length": settings.sequence_length,
            "seed": settings.seed,
            "keep_partial": self._keep_partial,
        }
        return "gpt" + hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=20).hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.get_batch([index]).items()}

    def get_batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Several samples at once: each array of an item with a leading dim [n]. Arrays may share memory with another,
        or rows with each other, and what is the same in every batch is: it must not be written into."""
        chosen = np.asarray(indices, np.int64)
        text = np.empty((len(chosen), self.settings.sequence_length + 1), np.int64)
        has_padding = self.read_text(chosen, np.arange(len(chosen)), text)
        return make_batch(text, self.settings, self.pad_id if has_padding else None)

    def read_text(self, indices: np.ndarray, rows: np.ndarray, text: np.ndarray) -> bool:
        """Read samples `indices`, int64 [n], into `rows`, int64 [n], of `text`, int64 [rows, L + 1].

        Returns:
            Whether there may be padding among them.
        """
        opened = self._open()
        lowest, highest, missing = fetch_samples(
            opened.indexed_dataset, opened.reader, indices, rows, text, self.pad_id
        )
        assert not missing or self._keep_partial, f"a sample among {indices} runs over the end of the documents"
        if len(indices):
            self._check_tokens(lowest, highest)
        return missing > 0 or lowest <= self.pad_id <= highest

    def _check_tokens(self, lowest: int, highest: int) -> None:
        """Refuse tokens that the model does not have."""
        vocab_size = self.settings.vocab_size
        if lowest >= 0 and (vocab_size is None or highest < vocab_size):
            return
        wrong = lowest if lowest < 0 else highest
        limit = "negative" if wrong < 0 else f"not below the vocabulary size {vocab_size}"
        raise ValueError(
            f"Token {wrong} in {self.path_prefix} is {limit}: the data was made with another tokenizer than this run's."
        )


def make_batch(text: np.ndarray, settings: GPTDatasetSettings, pad_id: int | None = None) -> dict[str, np.ndarray]:
    """Inputs, labels, masks and positions from `text`, int64 [n, L + 1]; the result is described at `GPTDataset`.

    Padding is masked where it is the label, and then replaced by token 0, which every embedding has. `tokens` and
    `labels` are views of `text`, and rows that cannot differ are one row in memory, the same in every batch: filling
    fresh memory takes longer than reading the tokens.
    """
    tokens, labels = text[:, :-1], text[:, 1:]
    loss_mask, position_ids = settings.no_mask[: len(text)], settings.positions[: len(text)]
    if settings.eod_mask_loss or pad_id is not None:
        loss_mask = loss_mask.copy()
    if settings.reset_position_ids:
        position_ids = position_ids.copy()
    batch = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
    if settings.reset_attention_mask:
        batch["document_ids"] = np.empty(tokens.shape, np.int64)
    if settings.reset_position_ids or settings.reset_attention_mask or settings.eod_mask_loss:
        assert settings.eod_id is not None, "the settings were checked"
        mark_documents(
            text,
            settings.eod_id,
            loss_mask if settings.eod_mask_loss else None,
            position_ids if settings.reset_position_ids else None,
            batch.get("document_ids"),
        )
    if pad_id is not None:
        loss_mask[labels == pad_id] = 0.0
        text[text == pad_id] = 0
    return batch


def _equal_rows(row: np.ndarray) -> np.ndarray:
    """`row` as [MOST_SAMPLES, L], all of them the same memory."""
    return np.ndarray((MOST_SAMPLES, len(row)), row.dtype, row, strides=(0, row.itemsize))
