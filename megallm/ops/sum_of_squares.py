"""The sum of squares of a list of tensors, such as the buckets that gradients are kept in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megallm.ops.library import NATIVE, register_fakes

__all__ = ["sum_of_squares", "sum_of_squares_reference"]


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor], device: torch.device, implementation: str = "auto") -> Tensor:
    """Sum of the squares of all elements of contiguous float32 or float64 tensors: float64 scalar on `device`.

    Squares are added in float64, in an order that depends on the lengths alone. So for float32 the sum is finite
    exactly if every element is. It is 0 where there is no tensor.
    """
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if NATIVE.serves("sum_of_squares", tensors[0], implementation):
        return torch.ops.megallm.sum_of_squares(tensors)
    return sum_of_squares_reference(tensors, device)


def sum_of_squares_reference(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The same in plain torch, where the norm of each tensor is taken in its own dtype."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total = total + torch.linalg.vector_norm(tensor).double().square()
    return total


def _fake_sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


register_fakes({"sum_of_squares": _fake_sum_of_squares})
