"""Training, validation and test data of a run: one dataset or a blend of several, cut into splits as Megatron does."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from weakref import WeakValueDictionary

import numpy as np

from megallm.config.data_sources import SPLIT_NAMES, DataSources, SplitSource, read_sources
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples import helpers, index_cache
from megallm.data.samples.bert import BERTDataset, BERTDatasetSettings
from megallm.data.samples.gpt import GPTDataset, GPTDatasetSettings, TooFewTokensError, make_batch
from megallm.data.samples.masked import MaskedDataset
from megallm.data.samples.open_datasets import OpenDatasets
from megallm.data.samples.t5 import T5Dataset, T5DatasetSettings

# Raised when the meaning of what is cached changes.
CACHE_VERSION = 1
Part = GPTDataset | MaskedDataset
Settings = GPTDatasetSettings | BERTDatasetSettings | T5DatasetSettings


class BlendedDataset:
    """Samples of several datasets in one order; an item is the dataset's sample with `dataset_id`, int64 [], added.

    Attributes: `datasets`, those that are blended; `dataset_index` int16 or int32 [samples] and `dataset_sample_index`
    int64 [samples] (see `helpers.build_blending_indices`); `build_seconds`, what building these two took, None where
    they were found.

    Args:
        datasets: what is blended.
        weights: positive, one a dataset, of any sum. Without them every dataset is drawn in proportion to its size.
        size: number of samples. None draws every dataset to its end, and needs `weights` to be None.
        cache_path: folder for the two indices; None builds them in memory in every process.

    Raises:
        ValueError: a weight is not positive, their number is another than the datasets', or a dataset has fewer samples
            than the blend draws.
    """

    def __init__(
        self,
        datasets: Sequence[Part],
        weights: Sequence[float] | None,
        size: int | None,
        cache_path: str | None = None,
    ) -> None:
        sizes = np.array([len(dataset) for dataset in datasets], np.int64)
        if weights is not None and len(weights) != len(datasets):
            raise ValueError(
                f"A blend of {len(datasets)} datasets has {len(weights)} weights; there must be one for each."
            )
        assert size is not None or weights is None, "weights without a size do not say where the blend ends"
        shares = sizes if size is None else normalize(sizes if weights is None else weights)

        self.build_seconds: float | None = None

        def build() -> dict[str, np.ndarray]:
            begin = time.perf_counter()
            if size is None:
                chosen, samples = helpers.build_exhaustive_blending_indices(sizes)
            else:
                chosen, samples = helpers.build_blending_indices(shares, size)
            self.build_seconds = time.perf_counter() - begin
            return {"dataset_index": chosen, "dataset_sample_index": samples}

        if cache_path is None:
            arrays = build()
        else:
            content = [CACHE_VERSION, size, shares.dtype.str]
            digest = hashlib.blake2b(json.dumps(content).encode() + shares.tobytes(), digest_size=20)
            arrays = index_cache.load_or_build(Path(cache_path), "blend" + digest.hexdigest(), build)
        self.dataset_index, self.dataset_sample_index = arrays["dataset_index"], arrays["dataset_sample_index"]
        drawn = np.bincount(self.dataset_index, minlength=len(datasets))
        for number, (has, needs) in enumerate(zip(sizes, drawn, strict=True)):
            if has < needs:
                # The blend is larger than what was asked for by less than one sample a dataset.
                asked = max(1.0, float(shares[number]) * (len(self.dataset_index) - len(datasets)))
                raise ValueError(
                    f"Dataset {number} of the blend has {has} samples, but the blend draws {needs}, because the share "
                    f"of each of its {len(datasets)} datasets is rounded up: --mid-level-dataset-surplus "
                    f"{math.ceil(100 * (needs / asked - 1)) / 100:g} builds enough of each."
                )
        self.datasets = list(datasets)
        # All of them, where the tokens of their samples may be read into one array.
        parts = [part for part in datasets if isinstance(part, GPTDataset)]
        are_alike = len(parts) == len(datasets) and all(part.settings == parts[0].settings for part in parts)
        self._alike = parts if are_alike else None

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
        alike = self._alike
        batch = self._read_parts(numbers, samples) if alike is None else self._read_text(alike, numbers, samples)
        return {**batch, "dataset_id": numbers}

    @staticmethod
    def _read_text(datasets: list[GPTDataset], numbers: np.ndarray, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Samples `samples` of datasets `numbers`, both int64 [n], all into one array of tokens."""
        first = datasets[0]
        text = np.empty((len(numbers), first.settings.sequence_length + 1), np.int64)
        has_padding = False
        for number in set(numbers.tolist()):
            rows = np.flatnonzero(numbers == number)
            has_padding |= datasets[number].read_text(samples[rows], rows, text)
        return make_batch(text, first.settings, first.pad_id if has_padding else None)

    def _read_parts(self, numbers: np.ndarray, samples: np.ndarray) -> dict[str, np.ndarray]:
        """The same from datasets of any kind, put together."""
        batch: dict[str, np.ndarray] = {}
        for number in set(numbers.tolist()):
            rows = np.flatnonzero(numbers == number)
            part = self.datasets[number].get_batch(samples[rows])
            if len(rows) == len(numbers):
                return part
            for name, array in part.items():
                whole = batch.setdefault(name, np.empty((len(numbers), *array.shape[1:]), array.dtype))
                whole[rows] = array
        return batch


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


def split_range(bounds: tuple[float, float], num_sequences: int) -> tuple[int, int]:
    """First sequence of a split, and the one behind its last."""
    low, high = bounds
    return round(low * float(num_sequences)), round(high * float(num_sequences))


def samples_of_each(weights: np.ndarray, size: int, surplus: float = 0.0) -> list[int]:
    """Samples that a blend of `size` takes from each dataset: its share, rounded up, the surplus, rounded up."""
    return [math.ceil(math.ceil(size * weight) * (1 + surplus)) for weight in weights.tolist()]


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        train, test: None where there is none.
        valid: by name, in the order of the list: "" for a single dataset or blend.
        without_test: why there is no test data although `--split` gives it a share, or "".
    """

    train: Part | BlendedDataset | None
    valid: dict[str, Part | BlendedDataset]
    test: Part | BlendedDataset | None
    without_test: str = ""


@dataclass(frozen=True)
class BuildOptions:
    """How datasets are opened and built.

    Attributes:
        mmap: map the files into memory (see `IndexedDataset`).
        multiple_validation_sets: each dataset of the validation list is one of its own, not a part of a blend.
        drop_last_partial_validation_sequence: False keeps the tokens that are left over at the end of the validation
            data as one sample more, filled up with padding.
        num_threads: datasets of a blend that are built at once.
        surplus: each dataset of a weighted blend is built this share larger than the blend needs.
        on_dataset: called after each dataset of each split that is ready, by any thread.
    """

    mmap: bool = True
    multiple_validation_sets: bool = False
    drop_last_partial_validation_sequence: bool = True
    num_threads: int = 1
    surplus: float = 0.005
    on_dataset: Callable[[], None] = lambda: None


def build_run_data(
    settings: Settings,
    sources: DataSources,
    num_samples: tuple[int | None, int | None, int | None],
    options: BuildOptions | None = None,
) -> RunData:
    """The training, validation and test data of a run.

    Args:
        settings: what all datasets share, and of which model they are.
        sources: which datasets, and which share of them.
        num_samples: how many samples training, validation and test must have at least; the documents are read as many
            times over as that takes. None reads them once. 0 builds nothing.
        options: how.

    Returns:
        A split is missing where it has no share or 0 samples are asked for; the test data also where its share of
        `--split` is too small. A single prefix without a weight is a dataset of that model, anything else a blend.

    Raises:
        ValueError: what `read_sources` raises; a file is missing or broken, a split of a dataset has too few tokens, or
            samples are asked of a split without a share.
    """
    builder = _Builder(settings, options or BuildOptions())
    found = read_sources(sources)
    is_shared = bool(sources.data_path or sources.data_args_path)
    for name, source, wanted in zip(SPLIT_NAMES[:2], found, num_samples, strict=False):
        if source is None and wanted:
            why = (
                f"--split {sources.split!r} gives {name} no share of the data: give it one, 969,30,1 for example"
                if is_shared
                else f"{sources.flags[0]} lists none for {name}: add some"
            )
            raise ValueError(f"{wanted} {name} samples are asked for, but {why}, or ask for no {name} samples.")
    train, valid, test = (None if wanted == 0 else source for source, wanted in zip(found, num_samples, strict=True))
    built_train = builder.build("training", train, num_samples[0])
    built_valid = builder.build_validation(valid, num_samples[1])
    try:
        return RunData(built_train, built_valid, builder.build("test", test, num_samples[2]))
    except TooFewTokensError as error:
        # The usual --split gives a thousandth to the test data, which little data has not got.
        if not is_shared:
            raise
        return RunData(built_train, built_valid, None, str(error))


class _Builder:
    """Builds splits; a file that several of them read is opened once."""

    def __init__(self, settings: Settings, options: BuildOptions) -> None:
        self._settings, self._options = settings, options
        self._open_datasets = OpenDatasets()
        # Those that are still open: the splits of a dataset share it.
        self._opened: WeakValueDictionary[str, IndexedDataset] = WeakValueDictionary()

    def build(
        self, name: str, source: SplitSource | None, num_samples: int | None, keep_partial: bool = False
    ) -> Part | BlendedDataset | None:
        """One split; the sizes are Megatron's."""
        if source is None:
            return None
        try:
            return self._blend(source, num_samples, keep_partial)
        except TooFewTokensError as error:
            raise TooFewTokensError(f"The {name} data ({source.flag}) cannot be built: {error}") from None
        except ValueError as error:
            raise ValueError(f"The {name} data ({source.flag}) cannot be built: {error}") from None

    def build_validation(self, source: SplitSource | None, num_samples: int | None) -> dict[str, Part | BlendedDataset]:
        """The validation data: one dataset of no name, or each under the last part of its path."""
        if source is None:
            return {}
        keep_partial = not self._options.drop_last_partial_validation_sequence
        parts = {"": source}
        if self._options.multiple_validation_sets and len(source.prefixes) > 1:
            names = [PurePath(prefix).name for prefix in source.prefixes]
            if len(set(names)) < len(names):
                names = source.prefixes
            if len(set(names)) < len(names):
                raise ValueError(f"The validation data ({source.flag}) names a dataset twice: each is one of its own.")
            parts = {
                name: replace(source, prefixes=[prefix], weights=None)
                for name, prefix in zip(names, source.prefixes, strict=True)
            }
        built = {name: self.build("validation", part, num_samples, keep_partial) for name, part in parts.items()}
        return {name: dataset for name, dataset in built.items() if dataset is not None}

    def _blend(self, source: SplitSource, num_samples: int | None, keep_partial: bool) -> Part | BlendedDataset:
        if source.weights is None and len(source.prefixes) == 1:
            return self._part(source, 0, num_samples, keep_partial)
        if source.weights is None:
            parts = self._parts(source, [None] * len(source.prefixes), keep_partial)
            available = sum(len(part) for part in parts)
            size = None if num_samples is None else min(num_samples, available)
            return BlendedDataset(parts, None, size, self._settings.cache_path)
        if num_samples is None:
            raise ValueError(
                "a weighted blend needs a number of samples; leave the weights out to take every dataset once."
            )
        shares = normalize(source.weights)
        parts = self._parts(source, samples_of_each(shares, num_samples, self._options.surplus), keep_partial)
        size = sum(samples_of_each(shares, num_samples))
        return BlendedDataset(parts, source.weights, size, self._settings.cache_path)

    def _parts(self, source: SplitSource, sizes: Sequence[int | None], keep_partial: bool) -> list[Part]:
        def part(number: int) -> Part:
            return self._part(source, number, sizes[number], keep_partial)

        with ThreadPoolExecutor(self._options.num_threads) as pool:
            return list(pool.map(part, range(len(sizes))))

    def _part(self, source: SplitSource, number: int, size: int | None, keep_partial: bool) -> Part:
        prefix = source.prefixes[number]
        dataset = self._opened.get(prefix)
        if dataset is None:
            self._opened[prefix] = dataset = IndexedDataset(prefix, mmap=self._options.mmap)
        part = self._cut(dataset, source.bounds, size, keep_partial)
        self._options.on_dataset()
        return part

    def _cut(self, dataset: IndexedDataset, bounds: tuple[float, float], size: int | None, keep_partial: bool) -> Part:
        settings = self._settings
        if isinstance(settings, GPTDatasetSettings):
            first, last = split_range(bounds, len(dataset))
            return GPTDataset(dataset, first, last, size, settings, keep_partial, self._open_datasets)
        first, last = split_range(bounds, MaskedDataset.num_elements(dataset))
        if isinstance(settings, BERTDatasetSettings):
            return BERTDataset(dataset, first, last, size, settings)
        return T5Dataset(dataset, first, last, size, settings)
