"""What a parameter says of itself, once; everything else asks it.

A stored tensor is a concatenation, along its first dim, of logical pieces (query, key and value; gate and up; or just
the tensor itself). Each piece has a global name and shape and the one box of it that this rank holds. Initialisation,
gradient reduction, the gradient norm, the optimizer, freezing and checkpoints all read this description, and none
decides anything about a parameter a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from megallm.ops.initial import normal_box, uniform_box


@dataclass(frozen=True)
class Piece:
    """The box [offset, offset + shape) of a logical tensor.

    `padding` rows of no logical content follow it in storage.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    padding: int = 0

    @property
    def rows(self) -> int:
        """Rows that the piece takes up in the stored tensor."""
        return self.shape[0] + self.padding


@dataclass(frozen=True)
class Initial:
    """Initial values: all equal to `size` ("constant"), normal with standard deviation `size` ("normal"), or spread
    evenly from -`size` to `size` ("uniform").
    """

    distribution: str
    size: float


# Shape of a whole matrix as it is stored, [rows, columns] over all ranks and pieces -> how it starts.
InitialMethod = Callable[[tuple[int, int]], Initial]


def normal(standard_deviation: float) -> InitialMethod:
    """The same deviation for a matrix of any shape."""
    return lambda shape: Initial("normal", standard_deviation)


def xavier_uniform(shape: tuple[int, int]) -> Initial:
    """As much variance forwards as backwards: uniform within sqrt(6 / (rows + columns)) (Glorot and Bengio, 2010)."""
    return Initial("uniform", math.sqrt(6.0 / sum(shape)))


@dataclass(frozen=True)
class Description:
    """How a stored tensor is made up, initialised, reduced and updated.

    Attributes:
        pieces: the logical pieces, in storage order.
        initial: the values it starts with.
        replicated_over: axes along which every rank holds these same boxes (data axes are always meant and not listed).
        gradient_partial_over: those of them along which each rank computes only a part of the gradient, so that the
            parts must be summed.
        tie: name shared by the holders of one logical tensor on several pipeline ranks, whose gradients must be
            summed; else None.
        counts: whether this holder is the one that stands for the tensor in the norm and in checkpoints.
        decays: whether weight decay applies.
        trains: whether the parameter is updated.
        of_vocabulary: whether it is the word embedding or the output layer, which may learn at a rate of their own.
    """

    pieces: tuple[Piece, ...]
    initial: Initial = Initial("constant", 0.0)
    replicated_over: tuple[str, ...] = ()
    gradient_partial_over: tuple[str, ...] = ()
    tie: str | None = None
    counts: bool = True
    decays: bool = True
    trains: bool = True
    of_vocabulary: bool = False


def split_evenly(
    global_shape: tuple[int, ...], dim: int, parts: int, index: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of part `index` of `parts` equal ones along `dim`."""
    assert global_shape[dim] % parts == 0, f"{global_shape} does not split into {parts} along dim {dim}"
    length = global_shape[dim] // parts
    offset, shape = [0] * len(global_shape), list(global_shape)
    offset[dim], shape[dim] = index * length, length
    return tuple(offset), tuple(shape)


def whole(name: str, shape: tuple[int, ...]) -> Piece:
    """A piece that every rank holds entirely."""
    return Piece(name, shape, (0,) * len(shape), shape)


def part(name: str, global_shape: tuple[int, ...], dim: int, parts: int, index: int) -> Piece:
    """A piece cut into equal parts along one dim."""
    return Piece(name, global_shape, *split_evenly(global_shape, dim, parts, index))


def padded_part(name: str, global_shape: tuple[int, ...], padded_rows: int, parts: int, index: int) -> Piece:
    """A piece whose first dim is cut after padding it to `padded_rows`; a rank may hold padding only."""
    rows = padded_rows // parts
    begin = min(index * rows, global_shape[0])
    end = min((index + 1) * rows, global_shape[0])
    offset = (begin,) + (0,) * (len(global_shape) - 1)
    return Piece(name, global_shape, offset, (end - begin, *global_shape[1:]), padding=rows - (end - begin))


def make_parameter(description: Description, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter that carries its description."""
    rows = sum(piece.rows for piece in description.pieces)
    shape = (rows, *description.pieces[0].shape[1:])
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=description.trains)
    parameter.description = description  # type: ignore[attr-defined]
    return parameter


def description_of(parameter: torch.Tensor) -> Description:
    """The description a parameter was made with."""
    return parameter.description  # type: ignore[attr-defined]


def freeze(parameter: nn.Parameter) -> None:
    """Takes a parameter out of training. To be called before gradient buffers are built."""
    parameter.description = replace(description_of(parameter), trains=False)  # type: ignore[attr-defined]
    parameter.requires_grad_(False)


def piece_views(tensor: torch.Tensor, description: Description) -> list[tuple[Piece, torch.Tensor]]:
    """Each piece with its box inside a stored tensor or one of its shape, such as a gradient; no padding."""
    views, begin = [], 0
    for piece in description.pieces:
        views.append((piece, tensor[begin : begin + piece.shape[0]]))
        begin += piece.rows
    return views


@torch.no_grad()
def initialize(parameter: torch.Tensor, seed: int, implementation: str = "auto") -> None:
    """Fills a parameter with its initial values: for each element the same bits in every layout. Padding is zero.

    `implementation` is that of the operator `initial_values`.
    """
    description = description_of(parameter)
    parameter.zero_()
    for piece, view in piece_views(parameter, description):
        distribution, size = description.initial.distribution, description.initial.size
        if distribution == "constant":
            view.fill_(size)
        elif view.numel():
            box = {"normal": normal_box, "uniform": uniform_box}[distribution]
            name = f"initial/{piece.name}"
            values = box(seed, name, piece.global_shape, piece.offset, piece.shape, view.device, implementation)
            view.copy_(values.mul_(size))


def boxes_of_range(shape: tuple[int, ...], begin: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The flat range [begin, end) of a row-major tensor as (offset, shape) boxes in order: at most 2d - 1 for d dims.

    Each box is contiguous in the flat order.
    """
    if begin >= end:
        return []
    if len(shape) == 1:
        return [((begin,), (end - begin,))]
    width = math.prod(shape[1:])
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    while begin < end:
        row, column = divmod(begin, width)
        if column == 0 and end - begin >= width:
            rows = (end - begin) // width
            boxes.append(((row,) + (0,) * (len(shape) - 1), (rows, *shape[1:])))
            begin += rows * width
            continue
        stop = min(end, (row + 1) * width)
        for offset, size in boxes_of_range(shape[1:], column, column + stop - begin):
            boxes.append(((row, *offset), (1, *size)))
        begin = stop
    return boxes
