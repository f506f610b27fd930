"""Two models tensor by tensor, whatever files they lie in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megallm.config.dictionary import difference
from megallm.config.tree import Config
from megallm.convert.model import Weights

_SLAB_BYTES = 2**26


@dataclass(frozen=True)
class TensorDifference:
    """How far two tensors are apart: the largest difference, and the first element that has it.

    A pair of elements that are both no numbers does not differ; one that is none and one that is differ by infinity.
    """

    name: str
    largest: float
    element: tuple[int, ...]


def compare(
    one: Weights,
    other: Weights,
    advance: Callable[[int], None] = lambda num_bytes: None,
    rounded_to: torch.dtype | None = None,
) -> Iterator[TensorDifference]:
    """Every tensor's difference, in the order of the model; `one` is rounded to a type before.

    Raises ValueError where the models have other tensors, or tensors of other shapes.
    """
    if one.shapes != other.shapes:
        names = [name for name in {**one.shapes, **other.shapes} if one.shapes.get(name) != other.shapes.get(name)]
        shapes = [weights.shapes.get(names[0]) for weights in (one, other)]
        raise ValueError(
            f"the models are not of one shape: {names[0]} has {shapes[0]} in one and {shapes[1]} in the other"
        )
    for name, shape in one.shapes.items():
        worst = TensorDifference(name, 0.0, (0,) * len(shape))
        # Differences are taken in float64.
        step = max(1, _SLAB_BYTES // (8 * math.prod(shape[1:])))
        for row in range(0, shape[0], step):
            slab = (min(step, shape[0] - row), *shape[1:])
            offset = (row,) + (0,) * (len(shape) - 1)
            first = torch.empty(slab, dtype=rounded_to or one.tensors.dtypes[name])
            second = torch.empty(slab, dtype=other.tensors.dtypes[name])
            one.tensors.fill(name, offset, first)
            other.tensors.fill(name, offset, second)
            worst = max(worst, _difference(name, row, first, second), key=lambda found: found.largest)
        yield worst
        advance(math.prod(shape) * other.tensors.dtypes[name].itemsize)


def _difference(name: str, row: int, first: torch.Tensor, second: torch.Tensor) -> TensorDifference:
    if first.dtype == second.dtype and torch.equal(first, second):
        return TensorDifference(name, 0.0, (row,) + (0,) * (first.dim() - 1))
    first, second = first.double(), second.double()
    apart = (first - second).abs()
    same = (first == second) | (first.isnan() & second.isnan())
    apart = apart.nan_to_num(nan=math.inf).masked_fill(same, 0.0)
    largest, place = apart.flatten().max(dim=0)
    element = [int(index) for index in torch.unravel_index(place, apart.shape)]
    return TensorDifference(name, float(largest), (row + element[0], *element[1:]))


def settings_apart(one: Config, other: Config) -> list[str]:
    """The settings of two models that differ, as sentences."""
    return [
        f"{path.removeprefix('model.')} is {first!r} in one and {second!r} in the other"
        for path, first, second in difference(one, other)
        if path.startswith("model.")
    ]
