"""Training, validation and test data of a run: one dataset or a blend of several, cut into splits as Megatron does."""

import math
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples import helpers
from megallm.data.samples.gpt import GPTDataset, GPTDatasetSettings

SPLIT_NAMES = ("training", "validation", "test")
# Megatron builds each dataset of a blend this share larger than the blend needs.
SURPLUS = 0.005


class BlendedDataset:
    """Samples of several datasets in one order; an item is the dataset's sample with `dataset_id`, int64 [], added.

    Attributes: `dataset_index` int16 or int32 [samples]; `dataset_sample_index` int64 [samples] (see
    `helpers.build_blending_indices`).

    Args:
        datasets: what is blended.
        weights: positive, one a dataset, of any sum. Without them every dataset is drawn in proportion to its size.
        size: number of samples. None draws every dataset to its end, and needs `weights` to be None.

    Raises:
        ValueError: a weight is not positive, their number is another than the datasets', or a dataset has fewer samples
            than the blend draws.
    """

    def __init__(self, datasets: Sequence[GPTDataset], weights: Sequence[float] | None, size: int | None) -> None:
        sizes = np.array([len(dataset) for dataset in datasets], np.int64)
        if weights is not None and len(weights) != len(datasets):
            raise ValueError(
                f"A blend of {len(datasets)} datasets has {len(weights)} weights; there must be one for each."
            )
        if size is None:
            assert weights is None, "weights without a size do not say where the blend ends"
            self.dataset_index, self.dataset_sample_index = helpers.build_exhaustive_blending_indices(sizes)
        else:
            shares = normalize(sizes if weights is None else weights)
            self.dataset_index, self.dataset_sample_index = helpers.build_blending_indices(shares, size)
        drawn = np.bincount(self.dataset_index, minlength=len(datasets))
        for number, (has, needs) in enumerate(zip(sizes, drawn, strict=True)):
            if has < needs:
                raise ValueError(f"Dataset {number} of the blend has {has} samples, but the blend draws {needs}.")
        self._datasets = list(datasets)

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.get_batch([index]).items()}

    def get_batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Several samples at once: each array of an item with a leading dim [n]."""
        chosen = np.asarray(indices, np.int64)
        outside = (chosen < 0) | (chosen >= len(self))
        if outside.any():
            raise IndexError(f"The blend has samples 0 to {len(self) - 1}, not {int(chosen[outside][0])}.")
        numbers, samples = self.dataset_index[chosen].astype(np.int64), self.dataset_sample_index[chosen]
        batch: dict[str, np.ndarray] = {}
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            part = self._datasets[number].get_batch(samples[rows])
            if len(rows) == len(chosen):
                batch = part
                break
            for name, array in part.items():
                whole = batch.setdefault(name, np.empty((len(chosen), *array.shape[1:]), array.dtype))
                whole[rows] = array
        return {**batch, "dataset_id": numbers}


def normalize(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64 weights of sum 1.

    Raises:
        ValueError: one of them is not a positive number.
    """
    values = np.asarray(weights, np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        wrong = next(value for value in values.tolist() if not (math.isfinite(value) and value > 0))
        raise ValueError(
            f"Weight {wrong:g} of a dataset is not a positive number; leave the dataset out of the list instead."
        )
    return values / np.sum(values)


def parse_data_path(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights from Megatron's list: `prefix ...` or `weight prefix weight prefix ...`.

    A list of even length whose every second entry, from the first on, is a number, holds weights.

    Raises:
        ValueError: the list is empty, or some of those entries are numbers and some are not.
    """
    entries = [entry.strip() for entry in data_path]
    if not entries or "" in entries:
        raise ValueError("--data-path needs the prefix of one dataset at least: the path without .bin or .idx.")
    if len(entries) % 2:
        return entries, None
    weights = [_number(entry) for entry in entries[::2]]
    known = [weight for weight in weights if weight is not None]
    if not known:
        return entries, None
    if len(known) < len(weights):
        wrong = entries[2 * weights.index(None)]
        raise ValueError(
            f"--data-path must be `weight prefix` pairs or prefixes alone; {wrong!r} stands in the place of a weight."
        )
    return entries[1::2], known


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """Three ranges of shares from Megatron's `--split`, "969, 30, 1" for example; None for a split that gets nothing.

    Raises:
        ValueError: there are more than three numbers, no positive one, or something that is no number.
    """
    words = re.findall(r"[.0-9]+", split)
    shares = [_number(word) for word in words]
    if re.search(r"[^.0-9,;:/\s\[\]()]", split) or None in shares or not 1 <= len(shares) <= 3:
        raise ValueError(
            f"--split {split!r} must be one to three numbers, for training, validation and test, such as 969,30,1."
        )
    values = np.array([share for share in shares if share is not None] + [0.0] * (3 - len(shares)))
    if not values.sum() > 0:
        raise ValueError(f"--split {split!r} leaves no data to any split: one number at least must be positive.")
    # The sums are taken one after another, as Megatron does: the rounding of a bound depends on it.
    bounds = list(accumulate((values / np.sum(values)).tolist(), initial=0.0))
    return [(low, high) if low < high else None for low, high in pairwise(bounds)]


def split_range(bounds: tuple[float, float], num_sequences: int) -> tuple[int, int]:
    """First sequence of a split, and the one behind its last."""
    low, high = bounds
    return round(low * float(num_sequences)), round(high * float(num_sequences))


def samples_of_each(weights: np.ndarray, size: int, surplus: float = 0.0) -> list[int]:
    """Samples that a blend of `size` takes from each dataset: its share, rounded up, the surplus, rounded up."""
    return [math.ceil(math.ceil(size * weight) * (1 + surplus)) for weight in weights.tolist()]


def build_train_valid_test_datasets(
    settings: GPTDatasetSettings, num_samples: tuple[int | None, int | None, int | None]
) -> list[GPTDataset | BlendedDataset | None]:
    """The training, validation and test data of a run.

    Args:
        settings: `data_path` is Megatron's list, prefixes or `weight prefix` pairs; `split` gives each of the three its
            share of the sequences of every dataset.
        num_samples: how many samples each split must have at least; the documents are read as many times over as that
            takes. None reads them once. 0 builds nothing.

    Returns:
        For each split a dataset, or None where it has no share or 0 samples are asked for. A single prefix without a
        weight is a `GPTDataset`, anything else a `BlendedDataset`.

    Raises:
        ValueError: a file is missing or broken, a split of a dataset has too few tokens, or samples are asked of a
            split without a share.
    """
    prefixes, weights = parse_data_path(settings.data_path)
    ranges = parse_split(settings.split)
    for name, bounds, wanted in zip(SPLIT_NAMES, ranges, num_samples, strict=True):
        if bounds is None and wanted:
            raise ValueError(
                f"{wanted} {name} samples are asked for, but --split {settings.split!r} gives {name} no share of "
                f"the data: give it one, 969,30,1 for example, or ask for no {name} samples."
            )
    indexed = [IndexedDataset(prefix) for prefix in prefixes]
    datasets: list[GPTDataset | BlendedDataset | None] = []
    for name, bounds, wanted in zip(SPLIT_NAMES, ranges, num_samples, strict=True):
        if bounds is None or wanted == 0:
            datasets.append(None)
            continue
        try:
            datasets.append(_build_split(indexed, weights, bounds, wanted, settings))
        except ValueError as error:
            raise ValueError(f"The {name} data (--split {settings.split!r}) cannot be built: {error}") from None
    return datasets


def _build_split(
    indexed: list[IndexedDataset],
    weights: list[float] | None,
    bounds: tuple[float, float],
    num_samples: int | None,
    settings: GPTDatasetSettings,
) -> GPTDataset | BlendedDataset:
    """One split of one dataset or of a blend; the sizes are Megatron's."""

    def build(dataset: IndexedDataset, size: int | None) -> GPTDataset:
        first, last = split_range(bounds, len(dataset))
        return GPTDataset(dataset, first, last, size, settings)

    if weights is None and len(indexed) == 1:
        return build(indexed[0], num_samples)
    if weights is None:
        parts = [build(dataset, None) for dataset in indexed]
        available = sum(len(part) for part in parts)
        return BlendedDataset(parts, None, None if num_samples is None else min(num_samples, available))
    if num_samples is None:
        raise ValueError(
            "a weighted blend needs a number of samples; leave the weights out to take every dataset once."
        )
    shares = normalize(weights)
    sizes = samples_of_each(shares, num_samples, SURPLUS)
    parts = [build(dataset, size) for dataset, size in zip(indexed, sizes, strict=True)]
    return BlendedDataset(parts, weights, sum(samples_of_each(shares, num_samples)))
