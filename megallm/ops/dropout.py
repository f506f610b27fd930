"""Dropout whose masks depend on the element, not on the layout, and the additions around it.

The mask of an element is a function of the stream's key, the step and the element's place in the whole tensor (see
`megallm.random`). The native operators make it where they use it, again in the backward pass, and keep none; the
reference keeps it as bool. Both drop the same elements. What is dropped is multiplied by zero: a NaN stays one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megallm.ops.library import NATIVE, register_fakes
from megallm.random import keep_mask

__all__ = ["Dropout", "dropout_add", "dropped_reference"]


class Dropout(NamedTuple):
    """Which elements of a tensor [..., columns] to drop.

    Attributes:
        probability: of being dropped; the rest is multiplied by 1 / (1 - probability).
        key: of the stream of random numbers, int64 [2].
        step: int64 scalar.
        rows: int64 [...], the global number of each row: the same row under the same key and step is masked alike in
            any layout.
    """

    probability: float
    key: Tensor
    step: Tensor
    rows: Tensor


def dropout_add(
    x: Tensor,
    dropout: Dropout,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Dropout of `x` + `bias`, plus `residual`.

    `x` [..., columns] is float32, bfloat16, float16 or float64 and may be a slice of a packed tensor; `bias` [columns]
    has its dtype, `residual` its shape and dtype. The native operator rounds the result once, and sums the bias's
    gradient over the rows in a fixed order. Not differentiable twice. Raises ValueError when shapes or dtypes do not
    fit.
    """
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype):
        raise ValueError(
            f"The bias must be as long as the last dimension of the input and have its dtype, but the input is "
            f"{x.dtype} {tuple(x.shape)} and the bias {bias.dtype} {tuple(bias.shape)}."
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"The residual must be like the input, but the input is {x.dtype} {tuple(x.shape)} and the residual "
            f"{residual.dtype} {tuple(residual.shape)}."
        )
    if dropout.rows.shape != x.shape[:-1]:
        raise ValueError(
            f"Dropout needs a number for each row, but the input is {tuple(x.shape)} and the numbers "
            f"{tuple(dropout.rows.shape)}."
        )
    if NATIVE.serves("dropout_add", x, implementation):
        return _DropoutAdd.apply(x, bias, residual, *dropout)
    dropped = dropped_reference(x if bias is None else x + bias, dropout)
    return dropped if residual is None else residual + dropped


def dropped_reference(x: Tensor, dropout: Dropout) -> Tensor:
    """Dropout alone, in plain torch."""
    keep = keep_mask(dropout.key, dropout.step, dropout.rows, 0, x.shape[-1], dropout.probability)
    return x * keep * (1.0 / (1.0 - dropout.probability))


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        probability: float,
        key: Tensor,
        step: Tensor,
        rows: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(key, step, rows)
        ctx.probability, ctx.has_bias = probability, bias is not None
        return torch.ops.megallm.dropout_add(x, bias, residual, key, step, rows, probability)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        key, step, rows = ctx.saved_tensors
        grad_x, grad_bias = torch.ops.megallm.dropout_add_backward(
            grad_output, key, step, rows, ctx.probability, ctx.has_bias
        )
        grad_residual = grad_output if ctx.needs_input_grad[2] else None
        # As wide as its sum: autograd rounds it, unless the bias's `grad_dtype` takes it as it is.
        return grad_x, grad_bias if ctx.has_bias else None, grad_residual, None, None, None, None


def _fake_forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, key: Tensor, step: Tensor, rows: Tensor, drop: float
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad_output: Tensor, key: Tensor, step: Tensor, rows: Tensor, drop: float, bias: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    grad_bias = grad_output.new_empty(grad_output.shape[-1] if bias else 0, dtype=wide)
    return grad_output.new_empty(grad_output.shape), grad_bias


register_fakes({"dropout_add": _fake_forward, "dropout_add_backward": _fake_backward})
