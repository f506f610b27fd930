"""Blends of more datasets than a process may have files open, or than 16 bits can number."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import write_dataset

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.blended import BlendedDataset
from megallm.data.samples.gpt import GPTDataset, GPTDatasetSettings
from megallm.data.samples.open_datasets import OpenDatasets

CHOSEN = GPTDatasetSettings(4)


def several(tmp_path, count):
    """Datasets of 9 documents of 5 tokens, which are the number of the dataset."""
    prefixes = [str(tmp_path / f"part{number}") for number in range(count)]
    for number, prefix in enumerate(prefixes):
        write_dataset(prefix, [[number] * 5] * 9, vocab_size=count)
    return prefixes


def num_open():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("has_cache", [True, False])
def test_those_used_last_stay_open(tmp_path, mmap, has_cache):
    prefixes = several(tmp_path, 20)
    chosen = GPTDatasetSettings(4, cache_path=str(tmp_path / "cache") if has_cache else None)
    before, pool = num_open(), OpenDatasets(limit=3)
    datasets = [GPTDataset(IndexedDataset(prefix, mmap), 0, 9, 30, chosen, False, pool) for prefix in prefixes]
    # No more than eight of each, as the documentation of the limit says.
    assert num_open() - before <= 3 * 8
    everything_open = [GPTDataset(IndexedDataset(prefix), 0, 9, 30, CHOSEN) for prefix in prefixes]
    for index in (5, 0, 29):
        for dataset, other in zip(datasets, everything_open, strict=True):
            assert np.array_equal(dataset[index]["tokens"], other[index]["tokens"])
            assert np.array_equal(dataset.shuffle_index, other.shuffle_index)
    del everything_open
    assert num_open() - before <= 3 * 8


def test_a_dataset_that_is_used_is_not_the_next_to_close(tmp_path):
    closed = []

    class Dataset:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)

    first, second, third, fourth = map(Dataset, "abcd")
    pool = OpenDatasets(limit=2)
    for dataset in (first, second, first, third, first, fourth, second):
        pool.used(dataset)
    assert closed == ["b", "c", "a"]


def test_a_dataset_that_changes_while_it_is_closed(tmp_path):
    prefixes, pool = several(tmp_path, 2), OpenDatasets(limit=1)
    first, _ = (GPTDataset(IndexedDataset(prefix), 0, 9, None, CHOSEN, False, pool) for prefix in prefixes)
    os.truncate(prefixes[0] + ".bin", 8)
    with pytest.raises(ValueError, match=r"part0\.bin changed while it was in use: it had 90 bytes, and has 8 now"):
        first[0]


PROGRAM = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
from megallm.config.data_sources import DataSources
from megallm.data.samples.blended import BuildOptions, build_run_data
from megallm.data.samples.gpt import GPTDatasetSettings
words = [word for number in range(150) for word in (str(1 + number % 3), sys.argv[1] + str(number))]
settings = GPTDatasetSettings(4, cache_path=sys.argv[1] + "cache")
sources, before = DataSources(data_path=tuple(words), split="5,2,2"), len(os.listdir("/proc/self/fd"))
built = build_run_data(settings, sources, (3000, 300, 300), BuildOptions(num_threads=6))
after = len(os.listdir("/proc/self/fd"))
assert after - before <= {hard} // 4 + 3, (before, after)
for blend in (built.train, built.valid[""], built.test):
    batch = blend.get_batch(range(len(blend)))
    assert (batch["tokens"] == batch["dataset_id"][:, None]).all()
    assert set(batch["dataset_id"].tolist()) == set(range(150))
"""


@pytest.mark.slow
@pytest.mark.parametrize("hard", [160, 4096])
def test_more_datasets_than_a_process_may_have_files_open(tmp_path, hard):
    """In a process of its own, whose limit is low, and can be raised a little or enough; several threads build."""
    several(tmp_path, 150)
    subprocess.run(
        [sys.executable, "-c", PROGRAM.format(hard=hard), str(tmp_path / "part")],
        check=True,
        cwd=Path(__file__).parents[3],
    )


def test_more_datasets_than_16_bits_can_number():
    class Number:
        def __init__(self, name):
            self._name = name

        def __len__(self):
            return 1

        def get_batch(self, indices):
            return {"tokens": np.full((len(indices), 2), self._name)}

    blend = BlendedDataset([Number(name) for name in range(40_000)], None, None)
    assert blend.dataset_index.dtype == np.int32
    assert blend[39_999]["tokens"].tolist() == [39_999, 39_999]
