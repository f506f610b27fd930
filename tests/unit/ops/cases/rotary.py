from functools import partial

import torch
from torch import Tensor

from megallm.ops.rotary import apply_rotary, split_and_rotate
from tests.unit.ops.accuracy import Case, Inputs

QUERY_HEADS, KEY_HEADS = 2, 1


def make(shape: tuple[int, ...], generator: torch.Generator, share: int) -> Inputs:
    """Heads of `width` elements, of which one in `share`, or one element less, is rotated; rows are positions."""
    *lead, width = shape
    rotated = width // share
    angles = torch.randn(*lead, rotated - rotated % 2, generator=generator, dtype=torch.float64)
    return {
        "query": torch.randn(*lead, QUERY_HEADS * width, generator=generator, dtype=torch.float64),
        "key": torch.randn(*lead, KEY_HEADS * width, generator=generator, dtype=torch.float64),
        "cosines": angles.cos(),
        "sines": angles.sin(),
    }


def _by_position(tensor: Tensor, heads: int) -> Tensor:
    """[sequence, (batch,) heads x elements] -> [sequence, batch, heads, elements]."""
    tensor = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor
    return tensor.unflatten(-1, (heads, tensor.shape[-1] // heads))


def tables(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """In float32 for 16-bit tensors, as the models have them."""
    wide = torch.float64 if inputs["query"].dtype == torch.float64 else torch.float32
    cosines, sines = (_by_position(inputs[name], 1).to(wide) for name in ("cosines", "sines"))
    return cosines, sines


def rotate(inputs: Inputs, implementation: str, interleaved: bool) -> tuple[Tensor, Tensor]:
    query, key = _by_position(inputs["query"], QUERY_HEADS), _by_position(inputs["key"], KEY_HEADS)
    rotated = apply_rotary((query, key), *tables(inputs), interleaved, implementation)
    first, second = (
        tensor.flatten(-2).view(inputs[name].shape) for tensor, name in zip(rotated, ("query", "key"), strict=True)
    )
    return first, second


def split(inputs: Inputs, implementation: str, interleaved: bool) -> Tensor:
    """Queries, keys, and keys as values, packed before and after."""
    packed = torch.cat((inputs["query"], inputs["key"], inputs["key"]), dim=-1)
    packed = packed.unsqueeze(1) if packed.dim() == 2 else packed
    heads = (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    parts = split_and_rotate(packed, heads, *tables(inputs), interleaved, implementation)
    joined = torch.cat([part.flatten(-2) for part in parts], dim=-1)
    return joined.view(*inputs["key"].shape[:-1], joined.shape[-1])


# Of one element in a head nothing is rotated.
SHAPES = ((0, 8), (1, 2), (7, 3), (37, 18), (131, 100), (2, 3, 255), (67, 256), (33, 128), (40, 1032), (1009, 24))
QUICK_SHAPES = ((0, 8), (1, 2), (7, 3), (2, 3, 255), (33, 128))

# Whole heads are rotated, or half of each; either with one kind of pairs in each way of calling.
CASES = [
    Case(
        f"{name}{' interleaved' if interleaved else ''}",
        "rotary",
        partial(make, share=share),
        partial(call, interleaved=interleaved),
        fixed=frozenset({"cosines", "sines"}),
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
    )
    for name, call, interleaved, share in (
        ("rotary", rotate, False, 1),
        ("rotary of half", rotate, True, 2),
        ("rotary out of a packed tensor", split, True, 1),
        ("rotary of half out of a packed tensor", split, False, 2),
    )
]
