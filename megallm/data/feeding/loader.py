"""From samples to the tensors of a step, read ahead by worker processes where that pays."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import islice
from typing import Protocol

import numpy as np
import torch

from megallm.data.feeding.sampler import GlobalBatchSampler
from megallm.data.feeding.workers import ReadingWorkers

MicroBatch = dict[str, torch.Tensor]


class SampleSource(Protocol):
    """What a loader reads from: `GPTDataset`, `BlendedDataset`, `MockDataset`, or anything alike."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

    def get_batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Several samples at once, `indices` int64 [n]: arrays [n, ...]; what all batches have alike may be shared."""
        ...


def build_loader(
    dataset: SampleSource, sampler: GlobalBatchSampler, num_workers: int = 0, pin_memory: bool = False
) -> Generator[list[MicroBatch], None, None]:
    """Yields, step by step, this rank's micro-batches; ends when the sampler does.

    A micro-batch is a dict of CPU tensors: what the dataset's `get_batch` gives, [micro_batch_size, ...], and
    `sample_ids` int64 [micro_batch_size], the place of each sample within the global batch. Worker processes start with
    the first step and end when the generator is closed, exhausted or collected, or when this process ends.

    Args:
        dataset: read in the worker processes, which inherit it as it is when the first step is asked for.
        sampler: decides what is read.
        num_workers: processes that read ahead, together the micro-batches of one step and one more each; 0 reads in
            this one, a step at a time.
        pin_memory: copy to page-locked memory, for asynchronous copies to a GPU; needs CUDA.

    Raises, at a step: ValueError with the sentence of the dataset, or with what ended a worker.
    """
    ahead = _read_ahead(dataset, sampler, num_workers) if num_workers else None
    for step in sampler:
        micro_batches = []
        for indices, places in step:
            arrays = dataset.get_batch(indices) if ahead is None else next(ahead)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            tensors["sample_ids"] = torch.from_numpy(places)
            if pin_memory:
                tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            elif ahead is not None:
                # The workers fill their arrays anew.
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            micro_batches.append(tensors)
        yield micro_batches


def _read_ahead(
    dataset: SampleSource, sampler: GlobalBatchSampler, num_workers: int
) -> Generator[dict[str, np.ndarray], None, None]:
    """The arrays of all micro-batches one after another, read by worker processes."""
    first = next(iter(sampler), None)
    if first is None:
        return
    # Every micro-batch has the form of the first one, so that memory for all of them can be laid out beforehand.
    form = dataset.get_batch(first[0][0])

    def read(worker: int) -> Iterator[dict[str, np.ndarray]]:
        micro_batches = (micro_batch for step in sampler for micro_batch in step)
        return (dataset.get_batch(indices) for indices, _ in islice(micro_batches, worker, None, num_workers))

    workers = ReadingWorkers(read, form, num_workers, depth=-(-sampler.most_micro_batches() // num_workers) + 1)
    try:
        yield from workers
    finally:
        workers.close()
