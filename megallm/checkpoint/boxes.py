"""What this rank holds of every logical tensor, as boxes: the same list serves saving and loading."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megallm.data_parallel.optimizer import BucketOptimizer, Shard
from megallm.mesh import Mesh
from megallm.parameter import Piece, boxes_of_range, description_of

WEIGHTS = "weights"


@dataclass(frozen=True)
class LocalBox:
    """A box of a logical tensor and the memory that holds it here.

    `tensor` is a view of the box's shape; `saves` tells whether this rank writes it (of several holders one does).
    """

    kind: str
    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor
    saves: bool

    @property
    def key(self) -> str:
        """Name of the box in a file: `kind/name@offset,offset`."""
        return f"{self.kind}/{self.name}@{','.join(str(start) for start in self.offset)}"


def declared_box(
    kind: str,
    name: str,
    dtype: torch.dtype,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
) -> LocalBox:
    """A box that this process will save, without its values: the whole tensor, or [offset, offset + shape) of it."""
    tensor = torch.empty(global_shape if shape is None else shape, dtype=dtype, device="meta")
    return LocalBox(kind, name, global_shape, offset or (0,) * len(global_shape), tensor, saves=True)


def local_boxes(optimizer: BucketOptimizer, chunks: dict[int, nn.Module], mesh: Mesh) -> Iterator[LocalBox]:
    """Weights and moments of this rank's ranges, and the frozen parameters of its chunks."""
    for shard in optimizer.shards:
        yield from shard_boxes(WEIGHTS, shard, shard.master)
        for kind, moment in shard.state.moments().items():
            yield from shard_boxes(kind, shard, moment)
    yield from weight_boxes(chunks, mesh, frozen_only=True)


def weight_boxes(chunks: dict[int, nn.Module], mesh: Mesh, frozen_only: bool = False) -> Iterator[LocalBox]:
    """The parameters of this rank's chunks as they stand in the model, all of them or the frozen ones."""
    for chunk in chunks.values():
        for parameter in dict.fromkeys(chunk.parameters()):
            description = description_of(parameter)
            if description.trains and frozen_only:
                continue
            first_holder = all(mesh.coordinates[axis] == 0 for axis in description.replicated_over)
            saves = description.counts and first_holder and mesh.dp.rank == 0
            flat = parameter.detach().view(-1)
            for piece, start, first, last in _pieces_in_range(parameter, 0, parameter.numel()):
                yield from _boxes(WEIGHTS, piece, first, last, flat[start + first : start + last], saves)


def shard_boxes(kind: str, shard: Shard, flat: torch.Tensor) -> Iterator[LocalBox]:
    """A flat tensor over the range of a shard (its master weights, a moment, the gradient) as boxes of logical
    tensors.
    """
    bucket = shard.bucket
    saves = bucket.key.counts and (bucket.sharded or bucket.group.rank == 0)
    for member in bucket.members:
        begin = max(member.begin, bucket.shard.start)
        end = min(member.end, bucket.shard.stop)
        for piece, start, first, last in _pieces_in_range(member.parameter, begin - member.begin, end - member.begin):
            place = member.begin + start - bucket.shard.start
            yield from _boxes(kind, piece, first, last, flat[place + first : place + last], saves)


def _pieces_in_range(parameter: nn.Parameter, begin: int, end: int) -> Iterator[tuple[Piece, int, int, int]]:
    """Pieces of a stored tensor that its flat range [begin, end) touches.

    (piece, where it starts, first, last within the piece).
    """
    row = math.prod(parameter.shape[1:])
    start = 0
    for piece in description_of(parameter).pieces:
        first, last = max(begin - start, 0), min(end - start, piece.shape[0] * row)
        if first < last:
            yield piece, start, first, last
        start += piece.rows * row


def _boxes(kind: str, piece: Piece, first: int, last: int, flat: torch.Tensor, saves: bool) -> Iterator[LocalBox]:
    """The flat range [first, last) of a piece, held in `flat`, as boxes of the logical tensor."""
    position = 0
    for offset, shape in boxes_of_range(piece.shape, first, last):
        size = math.prod(shape)
        place = tuple(a + b for a, b in zip(piece.offset, offset, strict=True))
        view = flat[position : position + size].view(shape)
        yield LocalBox(kind, piece.name, piece.global_shape, place, view, saves)
        position += size
