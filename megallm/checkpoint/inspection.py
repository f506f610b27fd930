"""What is in a checkpoint, and how two differ: read by pieces, so that neither needs more memory than a piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megallm.checkpoint.reading import SLAB_BYTES, OpenCheckpoint

Progress = Callable[[int], None]
Read = Callable[[tuple[int, ...], tuple[int, ...]], torch.Tensor]
"""Gives the box of a tensor that begins at an offset and has a shape."""

_INTEGERS = {dtype.itemsize: dtype for dtype in (torch.int16, torch.int32, torch.int64)}


@dataclass
class Values:
    """What the elements of a tensor are like. `norm` is the 2-norm; `non_finite` counts infinities and NaNs."""

    norm: float
    lowest: float
    highest: float
    non_finite: int


@dataclass
class Change:
    """How a tensor of two checkpoints differs: in `what`, and by how much where that can be said.

    `num_elements` of them differ, at most by `largest`, first at `element`; `norm` is that of the difference. A number
    and one that is none differ by infinity.
    """

    what: str
    num_elements: int = 0
    largest: float = 0.0
    element: tuple[int, ...] = ()
    norm: float = 0.0


def elements_differ(count: int) -> str:
    """So many elements, as the beginning of a sentence about a `Change`."""
    return "1 element differs" if count == 1 else f"{count:,} elements differ"


def split_name(tensor: str) -> tuple[str, str]:
    """`kind/name` as the two."""
    kind, _, name = tensor.partition("/")
    return kind, name


def values_of(checkpoint: OpenCheckpoint, tensor: str, progress: Progress = lambda count: None) -> Values:
    """Reads a tensor, named `kind/name`. Raises DamagedError where it is not as it was written."""
    squares, lowest, highest, non_finite = 0.0, math.inf, -math.inf, 0
    read = reader(checkpoint, tensor)
    for offset, shape in _pieces(checkpoint.manifest.tensors[tensor].shape):
        piece = read(offset, shape)
        values = piece.double()
        squares += float(values.square().sum())
        lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
        non_finite += int((~torch.isfinite(values)).sum())
        progress(piece.nbytes)
    return Values(math.sqrt(squares) if squares >= 0 else math.nan, lowest, highest, non_finite)


def changes_of_tensors(
    before: OpenCheckpoint, after: OpenCheckpoint, progress: Progress = lambda count: None
) -> dict[str, Change]:
    """Every tensor that is not the same in both, bit for bit.

    Raises DamagedError where one is not as it was written.
    """
    found: dict[str, Change] = {}
    names = dict.fromkeys([*before.manifest.tensors, *after.manifest.tensors])
    for name in names:
        old, new = before.manifest.tensors.get(name), after.manifest.tensors.get(name)
        if old is None or new is None:
            found[name] = Change("only in the first" if new is None else "only in the second")
        elif old.shape != new.shape:
            found[name] = Change(f"shape {list(old.shape)} -> {list(new.shape)}")
        else:
            change = change_of_values(old.shape, reader(before, name), reader(after, name), progress)
            if old.dtype != new.dtype:
                found[name] = change or Change("")
                found[name].what = f"type {old.dtype} -> {new.dtype}"
            elif change is not None:
                found[name] = change
    return found


def changes_of_state(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(where, value there, value here) for each value in which two nested states differ; "absent" where it is not."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            where = f"{path}.{key}" if path else str(key)
            yield from changes_of_state(before.get(key, "absent"), after.get(key, "absent"), where)
    elif before != after:
        yield path, before, after


def change_of_values(
    shape: tuple[int, ...], first: Read, second: Read, progress: Progress = lambda count: None
) -> Change | None:
    """How two tensors of a shape differ: where they are of one type, every bit of theirs; else the numbers.

    None where they do not. `progress` is told the bytes of both.
    """
    change, squares = Change("values"), 0.0
    for offset, part in _pieces(shape):
        old, new = first(offset, part), second(offset, part)
        progress(old.nbytes + new.nbytes)
        differs = _differs(old, new)
        if not differs.any():
            continue
        apart = (old.double() - new.double()).abs().masked_fill(~differs | (old.isnan() & new.isnan()), 0.0)
        largest, place = apart.nan_to_num(nan=math.inf, posinf=math.inf).flatten().max(dim=0)
        if not change.num_elements or float(largest) > change.largest:
            # Where the numbers are the same, the first whose bits are not.
            place = place if largest else differs.flatten().int().argmax()
            row, *rest = (int(index) for index in torch.unravel_index(place, old.shape))
            change.largest, change.element = float(largest), (offset[0] + row, *rest)
        change.num_elements += int(differs.sum())
        squares += float(apart.square().sum())
    change.norm = math.sqrt(squares) if squares >= 0 else math.nan
    return change if change.num_elements else None


def _differs(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one shape are not the same bits; of two types, not the same numbers."""
    if old.dtype != new.dtype:
        both_nan = old.isnan() & new.isnan()
        return (old.double() != new.double()) & ~both_nan
    # Zero and minus zero are equal as numbers, and a NaN is not even itself.
    integers = _INTEGERS[old.element_size()]
    return old.view(integers) != new.view(integers)


def reader(checkpoint: OpenCheckpoint, name: str) -> Read:
    """Reads boxes of a tensor, named `kind/name`."""
    kind, tensor = split_name(name)
    return lambda offset, shape: checkpoint.read(kind, tensor, offset, shape)


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A tensor as boxes of whole rows that are not large in float64: (offset, shape)."""
    rest = shape[1:]
    if not math.prod(shape):
        return
    rows = max(1, SLAB_BYTES // (8 * math.prod(rest)))
    for row in range(0, shape[0], rows):
        yield (row, *(0 for _ in rest)), (min(rows, shape[0] - row), *rest)


def tree_lines(names: list[str]) -> Iterator[tuple[int, str, str | None]]:
    """Names with dots as a tree: (depth, the part of the name to show, the name, or None for what only has children).

    A part that has one child only is joined with it.
    """
    root: dict[str, Any] = {}
    # Layer 10 comes after layer 9.
    for name in sorted(names, key=lambda name: [_place(part) for part in name.split(".")]):
        place = root
        for part in name.split("."):
            place = place.setdefault(part, {})
        place[""] = name
    yield from _lines(root, 0)


def _place(part: str) -> tuple[bool, int, str]:
    return not part.isdecimal(), int(part) if part.isdecimal() else 0, part


def _lines(place: dict[str, Any], depth: int) -> Iterator[tuple[int, str, str | None]]:
    for part, below in place.items():
        if part == "":
            continue
        shown = part
        while len(below) == 1 and "" not in below:
            ((part, below),) = below.items()
            shown += f".{part}"
        yield depth, shown, below.get("")
        yield from _lines(below, depth + 1)
