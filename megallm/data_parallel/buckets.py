"""Parameters and gradients in contiguous buckets, each reduced and gathered as a whole.

Parameters that are reduced over the same ranks, updated alike and belong to one model chunk lie one behind the other,
each from a multiple of ALIGNMENT elements on, and so does each rank's range: kernels may then take 16 bytes at once.
What is left between them is zero in weights, gradients and state, and in no checkpoint.
Gradients are kept in float32 (float64 for float64 parameters) and summed there over micro-batches. With sharding, each
rank of a bucket's group owns an equal flat range of it: its part of the reduced gradient, of the master weights and of
the optimizer's state (ZeRO-1, Rajbhandari et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from megallm.communication import Group, Work
from megallm.mesh import Mesh
from megallm.parameter import description_of

ALIGNMENT = 64
"""Elements: in every dtype a multiple of the 16 bytes, and of the 128 that a GPU reads and writes at once."""


@dataclass(frozen=True)
class BucketKey:
    """What parameters of one bucket have in common."""

    chunk: int
    reduction_axes: tuple[str, ...]
    dtype: torch.dtype
    tie: str | None
    decays: bool
    counts: bool
    decoupled: bool


@dataclass(frozen=True)
class Member:
    """A parameter and its flat range [begin, end) in the bucket."""

    parameter: nn.Parameter
    begin: int
    end: int


class Bucket:
    """Contiguous parameters and gradients.

    Attributes: `members`; `weights`, flat, in the parameters' dtype (the parameters are views of it); `gradient`,
        flat, float32 or float64; `group`, the ranks it is reduced over; `shard`, this rank's flat range (everything
        without sharding).
    """

    def __init__(self, key: BucketKey, parameters: list[nn.Parameter], mesh: Mesh, sharded: bool) -> None:
        self.key = key
        self.group: Group = mesh.group_over(key.reduction_axes)
        self.tie_group: Group | None = mesh.tie if key.tie is not None else None
        self.sharded = sharded and self.group.size > 1
        self.members: list[Member] = []
        begin = 0
        for parameter in parameters:
            self.members.append(Member(parameter, begin, begin + parameter.numel()))
            begin = _rounded_up(begin + parameter.numel(), ALIGNMENT)
        length = _rounded_up(begin, ALIGNMENT * self.group.size) if self.sharded else begin
        gradient_dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
        self.weights = torch.zeros(length, dtype=key.dtype, device=mesh.device)
        self.gradient = torch.zeros(length, dtype=gradient_dtype, device=mesh.device)
        for member in self.members:
            view = self.weights[member.begin : member.end].view_as(member.parameter)
            view.copy_(member.parameter.detach())
            member.parameter.data = view
        part = length // self.group.size
        self.shard = slice(self.group.rank * part, (self.group.rank + 1) * part) if self.sharded else slice(0, length)
        self._reducing = Work()
        self._gathering = Work()

    @property
    def num_paddings(self) -> int:
        """Elements of this rank's range that belong to no logical tensor; their gradients are always zero."""
        num_logical = 0
        for member in self.members:
            row, begin = math.prod(member.parameter.shape[1:]), member.begin
            for piece in description_of(member.parameter).pieces:
                end = begin + piece.shape[0] * row
                num_logical += max(0, min(end, self.shard.stop) - max(begin, self.shard.start))
                begin += piece.rows * row
        return self.shard.stop - self.shard.start - num_logical

    def gradient_of(self, member: Member) -> torch.Tensor:
        """The part of the gradient that belongs to a member, in its shape."""
        return self.gradient[member.begin : member.end].view_as(member.parameter)

    def start_reduction(self) -> None:
        """Sums the gradient over the holders of tied weights, then over the group; sharded, only this rank's range is
        complete after it.

        Tied holders lay out their buckets alike, so the first sum is over whole buckets and must come before the
        second.
        """
        if self.tie_group is not None:
            self.tie_group.all_reduce(self.gradient)
        if self.sharded:
            self._reducing = self.group.reduce_scatter(self.gradient[self.shard], self.gradient, asynchronous=True)
        else:
            self._reducing = self.group.all_reduce(self.gradient, asynchronous=True)

    def finish_reduction(self) -> None:
        """Waits until the gradient may be used."""
        self._reducing.wait()

    def start_gather(self) -> None:
        """Collects the updated ranges of all ranks in `weights`."""
        if self.sharded:
            self._gathering = self.group.all_gather(self.weights, self.weights[self.shard], asynchronous=True)

    def finish_gather(self) -> None:
        """Waits until the weights may be used."""
        self._gathering.wait()


def build_buckets(
    chunks: dict[int, nn.Module], mesh: Mesh, max_elements: int, sharded: bool, decoupled: bool = False
) -> list[Bucket]:
    """Puts every trainable parameter of this rank's chunks into a bucket.

    Buckets come in the order in which a backward pass completes them: last chunk first, last parameter first; a bucket
    is closed when it holds `max_elements`. With `decoupled`, word embedding and output layer lie in buckets of their
    own, since they learn at a rate of their own. To be called after freezing.
    """
    grouped: dict[tuple[BucketKey, int], list[nn.Parameter]] = {}
    current: dict[BucketKey, int] = {}
    filled: dict[BucketKey, int] = {}
    for chunk in sorted(chunks, reverse=True):
        for parameter in reversed(list(dict.fromkeys(chunks[chunk].parameters()))):
            if not description_of(parameter).trains:
                continue
            key = _key(chunk, parameter, mesh, decoupled)
            if filled.get(key, 0) >= max_elements:
                current[key] += 1
                filled[key] = 0
            number = current.setdefault(key, 0)
            grouped.setdefault((key, number), []).append(parameter)
            filled[key] = filled.get(key, 0) + parameter.numel()
    return [Bucket(key, parameters, mesh, sharded) for (key, _), parameters in grouped.items()]


def _key(chunk: int, parameter: nn.Parameter, mesh: Mesh, decoupled: bool) -> BucketKey:
    description = description_of(parameter)
    reduced_over = description.gradient_partial_over
    # Of ranks that hold and compute the same, the first one counts.
    first = all(mesh.coordinates[axis] == 0 for axis in description.replicated_over if axis not in reduced_over)
    return BucketKey(
        chunk=chunk,
        reduction_axes=reduced_over,
        dtype=parameter.dtype,
        tie=description.tie,
        decays=description.decays,
        counts=description.counts and first,
        decoupled=decoupled and description.of_vocabulary,
    )


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def own_parameters(module: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters that a module holds itself."""
    return (parameter for parameter in module._parameters.values() if parameter is not None)
