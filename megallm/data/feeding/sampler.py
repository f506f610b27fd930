"""Which samples a step reads, and which data-parallel rank and micro-batch each of them goes to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megallm.config.batch_sizes import BatchSizes
from megallm.data.feeding.orders import DataShare, SampleOrder

# Indices of a micro-batch's samples in the dataset, and their places within the global batch: int64 each.
MicroBatchSamples = tuple[np.ndarray, np.ndarray]


class GlobalBatchSampler:
    """Walks an order of samples from `consumed_samples` on, a global batch a step.

    Iterating yields, for each step, this rank's micro-batches: their samples and the places of these within the global
    batch. A step of n samples has n / (micro_batch_size * data parallel size) of them; micro-batch k is the rank's
    share of the k-th group of the step. `consumed_samples` is all the state there is: it tells the size of the next
    batch, too. An incomplete last batch is dropped. Iterating twice gives the same steps twice.

    Raises:
        ValueError: a global batch cannot be cut evenly (when it is reached), or a number is out of range.
    """

    def __init__(self, order: SampleOrder, consumed_samples: int, batch_sizes: BatchSizes, share: DataShare) -> None:
        if share.micro_batch_size < 1:
            raise ValueError(f"The micro-batch size is {share.micro_batch_size}, but must be 1 at least.")
        if consumed_samples < 0:
            raise ValueError(f"{consumed_samples} samples are consumed: that may not be negative.")
        assert 0 <= share.rank < share.size, f"rank {share.rank} is not among {share.size}"
        self._order, self._consumed_samples, self._batch_sizes, self._share = (
            order,
            consumed_samples,
            batch_sizes,
            share,
        )

    def __iter__(self) -> Iterator[list[MicroBatchSamples]]:
        consumed, order, group = self._consumed_samples, self._order, self._share.group
        while True:
            size = self._batch_sizes.at(consumed)
            self._check(size)
            left = order.num_samples_after(consumed)
            if left is not None and left < size:
                return
            yield [(order.read(consumed + start), start + order.places) for start in range(0, size, group)]
            consumed += size

    def most_micro_batches(self) -> int:
        """The largest number of micro-batches that a step has."""
        return self._batch_sizes.largest // self._share.group

    def _check(self, batch_size: int) -> None:
        share = self._share
        if batch_size % share.group == 0:
            return
        lower = batch_size // share.group * share.group
        nearest = f"{lower} or {lower + share.group}" if lower else str(share.group)
        raise ValueError(
            f"A global batch of {batch_size} samples cannot be cut into micro-batches of {share.micro_batch_size} on "
            f"{share.size} data-parallel ranks ({share.micro_batch_size} x {share.size} = {share.group}); {nearest} "
            "can."
        )
