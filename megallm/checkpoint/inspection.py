"""What is in a checkpoint, and how two differ: read by pieces, so that neither needs more memory than a piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megallm.checkpoint.manifest import DTYPES
from megallm.checkpoint.reading import SLAB_BYTES, OpenCheckpoint

Progress = Callable[[int], None]

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

    `num_elements` of them differ, at most by `largest`; `norm` is that of the difference.
    """

    what: str
    num_elements: int = 0
    largest: float = 0.0
    norm: float = 0.0


def split_name(tensor: str) -> tuple[str, str]:
    """`kind/name` as the two."""
    kind, _, name = tensor.partition("/")
    return kind, name


def values_of(checkpoint: OpenCheckpoint, tensor: str, progress: Progress = lambda count: None) -> Values:
    """Reads a tensor, named `kind/name`. Raises DamagedError where it is not as it was written."""
    squares, lowest, highest, non_finite = 0.0, math.inf, -math.inf, 0
    for _, piece in _pieces(checkpoint, tensor):
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
            change = _change_of_values(before, after, name, progress)
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


def _change_of_values(before: OpenCheckpoint, after: OpenCheckpoint, name: str, progress: Progress) -> Change | None:
    change, squares = Change("values"), 0.0
    kind, tensor = split_name(name)
    for offset, old in _pieces(before, name):
        new = after.read(kind, tensor, offset, tuple(old.shape))
        progress(old.nbytes + new.nbytes)
        differs = _differs(old, new)
        if differs.any():
            difference = (old.double() - new.double())[differs].abs()
            change.num_elements += int(differs.sum())
            change.largest = max(change.largest, float(difference.max()))
            squares += float(difference.square().sum())
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


def _pieces(checkpoint: OpenCheckpoint, name: str) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """A tensor as boxes of whole rows that are not large: (offset, values)."""
    kind, tensor = split_name(name)
    saved = checkpoint.saved(kind, tensor)
    rest = saved.shape[1:]
    rows = max(1, SLAB_BYTES // max(1, math.prod(rest) * DTYPES[saved.dtype].itemsize))
    if not math.prod(saved.shape):
        return
    for first in range(0, saved.shape[0], rows):
        offset = (first, *(0 for _ in rest))
        yield offset, checkpoint.read(kind, tensor, offset, (min(rows, saved.shape[0] - first), *rest))


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
