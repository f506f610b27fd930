"""Rows of a table: added to hidden states, and the gradient of having been looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from megallm.ops.library import NATIVE, register_fakes

__all__ = ["accumulate_rows", "accumulate_rows_reference", "add_rows", "add_rows_reference"]


@torch.no_grad()
def accumulate_rows(target: Tensor, gradient: Tensor, rows: Tensor, implementation: str = "auto") -> None:
    """target[rows[i]] += gradient[i] for every i, in place: the gradient of an embedding, where it is kept.

    target [entries, width], contiguous, float32 or float64; gradient [..., width] of its dtype or, for float32,
    bfloat16 or float16; rows int64 [...], where a number below 0 is left out. However often a row occurs, it is summed
    in the target's dtype. The native operator adds in a fixed order on every device, so that two runs give the
    same bits; it makes no table of its own.
    """
    sixteen = target.dtype == torch.float32 and gradient.dtype in (torch.bfloat16, torch.float16)
    fits = gradient.dtype == target.dtype or sixteen
    if fits and NATIVE.serves("embedding_gradient", target, implementation):
        order = rows.reshape(-1).argsort(stable=True) if rows.is_cuda else None
        torch.ops.megallm.embedding_gradient_(target, gradient, rows, order)
        increment_version(target)
        return
    accumulate_rows_reference(target, gradient, rows)


def accumulate_rows_reference(target: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """The same in plain torch."""
    entries, numbers = target.shape[0], rows.reshape(-1)
    # One entry more takes what is left out. [..., width] -> [tokens, width]
    numbers = torch.where(numbers < 0, entries, numbers)
    wide = gradient.reshape(-1, gradient.shape[-1]).to(target.dtype)
    added = torch.ops.aten.embedding_dense_backward(wide, numbers, entries + 1, -1, False)
    target.add_(added[:entries])


def add_rows(x: Tensor, table: Tensor, rows: Tensor, implementation: str = "auto") -> Tensor:
    """x + table[rows] for x [..., width], table [entries, width] of its dtype, rows int64 [...].

    Natively in one pass, rounded once, and the table's gradient is summed as `accumulate_rows` does.
    """
    if x.dtype == table.dtype and NATIVE.serves("add_rows", x, implementation):
        return _AddRows.apply(x, table, rows, implementation)
    return add_rows_reference(x, table, rows)


def add_rows_reference(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """The same in plain torch."""
    return x + torch.nn.functional.embedding(rows, table)


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, rows: Tensor, implementation: str) -> Tensor:
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(rows)
        ctx.shape, ctx.implementation = table.shape, implementation
        return torch.ops.megallm.add_rows(x, table, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        (rows,), wide = ctx.saved_tensors, torch.float64 if grad.dtype == torch.float64 else torch.float32
        grad_table = grad.new_zeros(ctx.shape, dtype=wide)
        accumulate_rows(grad_table, grad, rows, ctx.implementation)
        # As wide as its sum: autograd rounds it, unless the table's `grad_dtype` takes it as it is.
        return grad, grad_table, None, None


def _fake_embedding_gradient(target: Tensor, gradient: Tensor, rows: Tensor, order: Tensor | None) -> None:
    return None


def _fake_add_rows(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(x.shape)


register_fakes({"embedding_gradient_": _fake_embedding_gradient, "add_rows": _fake_add_rows})
