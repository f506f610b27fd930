"""In which order the samples of an index are read, and how a group of them is dealt to the data parallel ranks.

A group is one micro-batch for each rank: `micro_batch_size * data_parallel_size` samples, the unit of Megatron's
loaders. Its place in the order is the number of samples that were consumed before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megallm.config.report import counted


@dataclass(frozen=True)
class DataShare:
    """The part of each group that a data parallel rank reads."""

    micro_batch_size: int
    rank: int = 0
    size: int = 1

    @property
    def group(self) -> int:
        """Samples in a micro-batch of all ranks together."""
        return self.micro_batch_size * self.size


class SampleOrder(Protocol):
    """Decides which samples a rank's micro-batch holds.

    `places` int64 [micro_batch_size] are the places of the rank's samples in their group: the same for every group.
    """

    places: np.ndarray

    def read(self, consumed_samples: int) -> np.ndarray:
        """Indices, int64 [micro_batch_size], of this rank's samples in the group after `consumed_samples`."""
        ...

    def num_samples_after(self, consumed_samples: int) -> int | None:
        """Samples still to come; None: the order never ends."""
        ...


class SingleOrder:
    """Each sample once, in the order of the index, as Megatron's `single` loader: the same for every layout."""

    def __init__(self, num_samples: int, share: DataShare) -> None:
        self.places = share.rank * share.micro_batch_size + np.arange(share.micro_batch_size)
        self._num_samples = num_samples

    def read(self, consumed_samples: int) -> np.ndarray:
        """Indices, int64 [micro_batch_size], of this rank's samples in the group after `consumed_samples`."""
        return consumed_samples + self.places

    def num_samples_after(self, consumed_samples: int) -> int:
        """Samples still to come."""
        return max(0, self._num_samples - consumed_samples)


class CyclicOrder:
    """All samples in a random order, and then again in another: Megatron's `cyclic` loader.

    An epoch has as many samples as make whole groups; the rest is left out. Epoch e is dealt by
    `torch.randperm` with a generator seeded with e (not with the run's seed). With `sharding` each rank has an equal,
    contiguous bucket of the samples and walks it in the order of one permutation that all ranks share. Without, one
    permutation of all samples is dealt like cards: place p of a group goes to rank p % size.

    With sharding the order depends on the micro-batch size and the data parallel size. Without it, it depends on them
    only through the length of an epoch and of the permutation, the number of samples rounded down to whole groups and
    to whole micro-batches: where the global batch size divides the number of samples, no layout changes the order.
    Where whole micro-batches make no whole groups, Megatron's ranks without sharding drift into different epochs; here
    all of them leave out the rest.

    Raises:
        ValueError: there are fewer samples than one group has.
    """

    def __init__(self, num_samples: int, share: DataShare, *, sharding: bool) -> None:
        self.epoch_length = num_samples // share.group * share.group
        if not self.epoch_length:
            raise ValueError(
                f"{num_samples} samples do not fill one micro-batch of {share.micro_batch_size} on each of "
                f"{counted(share.size, 'data parallel rank')} ({share.micro_batch_size} x {share.size} = {share.group})"
            )
        order = np.arange(share.micro_batch_size)
        if sharding:
            self.places = share.rank * share.micro_batch_size + order
            self._permuted = self.epoch_length // share.size
            self._first, self._step, self._in_permutation = share.rank * self._permuted, share.size, order
        else:
            self.places = share.rank + share.size * order
            self._permuted = num_samples // share.micro_batch_size * share.micro_batch_size
            self._first, self._step, self._in_permutation = 0, 1, self.places
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def read(self, consumed_samples: int) -> np.ndarray:
        """Indices, int64 [micro_batch_size], of this rank's samples in the group after `consumed_samples`."""
        epoch, within = divmod(consumed_samples, self.epoch_length)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self._permuted, epoch)
        return self._first + self._permutation[within // self._step + self._in_permutation]

    def num_samples_after(self, consumed_samples: int) -> None:
        """The order never ends."""
        return None


def permutation(length: int, seed: int) -> np.ndarray:
    """The numbers below `length`, int64, in torch's random order for this seed; versions of torch may differ in it."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).numpy()


def build_order(kind: str, num_samples: int, share: DataShare, *, sharding: bool) -> SampleOrder:
    """The order of Megatron's `--dataloader-type` single or cyclic; `sharding` concerns the latter only."""
    if kind == "cyclic":
        return CyclicOrder(num_samples, share, sharding=sharding)
    assert kind == "single", f"there is no order {kind!r}"
    return SingleOrder(num_samples, share)


def layout_in_order(kind: str, num_samples: int, share: DataShare, *, sharding: bool) -> str:
    """What an order takes from the layout, as a text: two layouts with the same text read the same samples.

    Empty for an order that takes nothing.
    """
    if kind == "single":
        return ""
    if sharding:
        return f"micro-batches of {share.micro_batch_size} on {counted(share.size, 'data parallel rank')}"
    whole = num_samples // share.micro_batch_size * share.micro_batch_size
    return f"epochs of {num_samples // share.group * share.group} of {whole} samples"
