"""Two models tensor by tensor, whatever files they lie in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from megallm.checkpoint.inspection import Change, Read, change_of_values
from megallm.config.dictionary import difference
from megallm.config.tree import Config
from megallm.convert.model import Weights


def compare(
    one: Weights,
    other: Weights,
    advance: Callable[[int], None] = lambda num_bytes: None,
    rounded_to: torch.dtype | None = None,
) -> Iterator[tuple[str, Change]]:
    """(name, how they differ) of every tensor that is not the same in both; `one` is rounded to a type before.

    `advance` is told the bytes of each tensor of `other` that was read.

    Raises ValueError where the models have other tensors, or tensors of other shapes.
    """
    if one.shapes != other.shapes:
        names = [name for name in {**one.shapes, **other.shapes} if one.shapes.get(name) != other.shapes.get(name)]
        shapes = [weights.shapes.get(names[0]) for weights in (one, other)]
        raise ValueError(
            f"the models are not of one shape: {names[0]} has {shapes[0]} in one and {shapes[1]} in the other"
        )
    for name, shape in one.shapes.items():
        change = change_of_values(shape, _reader(one, name, rounded_to), _reader(other, name))
        if change is not None:
            yield name, change
        advance(math.prod(shape) * other.tensors.dtypes[name].itemsize)


def _reader(weights: Weights, name: str, dtype: torch.dtype | None = None) -> Read:
    def read(offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype or weights.tensors.dtypes[name])
        weights.tensors.fill(name, offset, tensor)
        return tensor

    return read


def settings_apart(one: Config, other: Config) -> list[str]:
    """The settings of two models that differ, as sentences."""
    return [
        f"{path.removeprefix('model.')} is {first!r} in one and {second!r} in the other"
        for path, first, second in difference(one, other)
        if path.startswith("model.")
    ]
