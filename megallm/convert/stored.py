"""How foreign files store a model: each of their tensors is made of rows of logical tensors.

A stored tensor is a concatenation along its first dim of parts, each a box of a logical tensor, as a parameter of the
engine is one of pieces (`megallm/parameter.py`). This covers query, key and value in one matrix, in a row or by
the head; gate and up in one; a tensor rank's rows or columns; all layers in one tensor; a vocabulary with padding. The
whole may be transposed. Reading finds the parts that hold a box of a logical tensor, writing puts parts together, and
neither knows whose files they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megallm.convert.raw import RawFiles, RawTensor


class LogicalTensors(Protocol):
    """A model's tensors by their logical names, from wherever they are."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The type that each has."""

    def fill(self, name: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Fills `tensor` with the box of its shape that begins at `offset`; converts where the types differ."""


@dataclass(frozen=True)
class Part:
    """The box [offset, offset + shape) of a logical tensor."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        name: in the file.
        parts: what its rows are, in order.
        padding: rows of zeros after them.
        transposed: whether the file holds its transpose.
    """

    name: str
    parts: tuple[Part, ...]
    padding: int = 0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        shape = (sum(part.shape[0] for part in self.parts) + self.padding, *self.parts[0].shape[1:])
        return shape[::-1] if self.transposed else shape


def whole_part(name: str, shape: tuple[int, ...]) -> Part:
    """All of a logical tensor."""
    return Part(name, (0,) * len(shape), shape)


def cut_rows(stored: Stored, begin: int, end: int) -> Stored:
    """The rows [begin, end) of a stored tensor that is not transposed."""
    assert not stored.transposed, f"{stored.name} is transposed"
    parts, first = [], 0
    for part in stored.parts:
        last = first + part.shape[0]
        low, high = max(begin, first), min(end, last)
        if low < high:
            offset = (part.offset[0] + low - first, *part.offset[1:])
            parts.append(Part(part.name, offset, (high - low, *part.shape[1:])))
        first = last
    padding = max(0, end - max(begin, first))
    if not parts:
        # Nothing but padding: a part of no rows still tells the width.
        part = stored.parts[-1]
        parts = [Part(part.name, part.offset, (0, *part.shape[1:]))]
    return replace(stored, parts=tuple(parts), padding=padding)


def cut_columns(stored: Stored, begin: int, end: int) -> Stored:
    """The columns [begin, end) of a stored matrix that is not transposed."""
    assert not stored.transposed, f"{stored.name} is transposed"
    parts = tuple(
        Part(part.name, (part.offset[0], part.offset[1] + begin), (part.shape[0], end - begin)) for part in stored.parts
    )
    return replace(stored, parts=parts)


def gather(stored: Stored, source: LogicalTensors, dtype: torch.dtype) -> torch.Tensor:
    """The stored tensor, put together from logical ones."""
    tensor = torch.empty(stored.shape, dtype=dtype)
    rows = tensor.t() if stored.transposed else tensor
    begin = 0
    for part in stored.parts:
        source.fill(part.name, part.offset, rows[begin : begin + part.shape[0]])
        begin += part.shape[0]
    rows[begin:].zero_()
    return tensor


class StoredTensors:
    """Logical tensors out of stored ones in files: `LogicalTensors` for anything but our own checkpoints.

    `shapes` are those of the logical tensors that are wanted. Where several stored tensors hold the same box, as copies
    of tied weights do, the first one counts.
    """

    def __init__(
        self, files: RawFiles, stored: Iterable[tuple[Stored, RawTensor]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._files = files
        self._places: dict[str, list[_Place]] = {name: [] for name in shapes}
        self.dtypes: dict[str, torch.dtype] = {}
        for one, raw in stored:
            row = 0
            for part in one.parts:
                places = self._places[part.name]
                if part.shape[0] and all(place.part != part for place in places):
                    places.append(_Place(raw, part, row, one.transposed))
                    assert raw.dtype is not None, f"{one.name} was checked"
                    self.dtypes.setdefault(part.name, raw.dtype)
                row += part.shape[0]
        for name, places in self._places.items():
            held = sum(math.prod(place.part.shape) for place in places)
            if held != math.prod(shapes[name]):
                raise ValueError(f"the files hold {held} of {math.prod(shapes[name])} elements of {name}")

    def fill(self, name: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Fills `tensor` with the box of its shape that begins at `offset`; converts where the types differ."""
        for place in self._places[name]:
            common = _overlap(place.part, offset, tensor.shape)
            if common is None:
                continue
            begin, end = common
            here = tensor[tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset, strict=True))]
            there = tuple(a - o for a, o in zip(begin, place.part.offset, strict=True))
            there = (place.row + there[0], *there[1:])
            if place.transposed:
                self._files.fill(place.raw, there[::-1], here.t())
            else:
                self._files.fill(place.raw, there, here)


@dataclass(frozen=True)
class _Place:
    """Where a part is: rows of a raw tensor from `row` on, or columns where that is transposed."""

    raw: RawTensor
    part: Part
    row: int
    transposed: bool


def _overlap(part: Part, offset: Sequence[int], shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """First corner and the one behind the last of what a part and a box share, if they do."""
    begin = tuple(max(a, b) for a, b in zip(part.offset, offset, strict=True))
    ends = zip(part.offset, part.shape, offset, shape, strict=True)
    end = tuple(min(a + n, b + m) for a, n, b, m in ends)
    return (begin, end) if all(first < last for first, last in zip(begin, end, strict=True)) else None
