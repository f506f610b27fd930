"""From samples to stacked tensors, read ahead by worker processes where that pays."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megallm.data.feeding.sampler import GlobalBatchSampler, SamplePlace

MicroBatch = dict[str, torch.Tensor]


class SampleSource(Protocol):
    """What a loader reads from: `GPTDataset`, `BlendedDataset`, `MockDataset`, or anything alike."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class _MicroBatches(Dataset[MicroBatch]):
    """Reads a whole micro-batch for one index, which is the list of its samples."""

    def __init__(self, dataset: SampleSource) -> None:
        self._dataset = dataset

    def __getitem__(self, micro_batch: list[SamplePlace]) -> MicroBatch:
        samples = [self._dataset[index] for index, _ in micro_batch]
        tensors = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        tensors["sample_ids"] = torch.tensor([place for _, place in micro_batch], dtype=torch.int64)
        return tensors


def _as_list(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return micro_batches


def build_loader(
    dataset: SampleSource, sampler: GlobalBatchSampler, num_workers: int = 0, pin_memory: bool = False
) -> Iterable[list[MicroBatch]]:
    """An iterable over steps, each a list of this rank's micro-batches.

    A micro-batch is a dict of CPU tensors: what the dataset's samples hold, stacked, [micro_batch_size, L], and
    `sample_ids` int64 [micro_batch_size], the place of each sample within the global batch. Ends when the sampler does.

    Args:
        dataset: read in the worker processes.
        sampler: decides what is read; it runs ahead of the steps when there are workers.
        num_workers: processes that read ahead, two steps each; 0 reads in this one.
        pin_memory: copy to page-locked memory, for asynchronous copies to a GPU; needs CUDA.
    """
    return DataLoader(
        _MicroBatches(dataset),
        # What it calls an index is a micro-batch here: the list of its samples.
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_list,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # A generator of its own: without one each iteration would draw from torch's global generator.
        generator=torch.Generator(),
    )
