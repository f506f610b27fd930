"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with the two halves of a head as the rotated pairs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["apply_rotary", "apply_rotary_reference"]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first `dim` elements of every head of `x` [sequence, batch, heads, head_dim]; the rest passes.

    `cos` and `sin` are [sequence, batch or 1, 1, dim] with dim even and at most head_dim; they receive no gradient.
    Element i of the first half and element i of the second are a pair, as in Hugging Face models: with x = (a, b), the
    result is (a cos - b sin, b cos + a sin). Computed in the wider dtype of `x` and `cos`, returned in that of `x`,
    contiguous. The backward pass rotates by the opposite angle and keeps nothing but `cos` and `sin`. Raises ValueError
    when the shapes do not fit.
    """
    dim = cos.shape[-1]
    if cos.shape != sin.shape or dim % 2 != 0 or dim > x.shape[-1]:
        raise ValueError(
            f"Rotary embedding needs cosine and sine of one shape with an even last dimension of at most the head's "
            f"{x.shape[-1]}, but they are {tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if torch.compiler.is_compiling():
        return apply_rotary_reference(x, cos, sin)  # which the compiler fuses, and it cannot write into a slice
    return _Rotary.apply(x, cos, sin)


def apply_rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as a composition of differentiable torch operators."""
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat(((rotated * cos + turned * sin).to(x.dtype), rest), dim=-1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The transposed rotation takes the sine of the other element of the pair; halves that differ are exchanged.
        half = sin.shape[-1] // 2
        return _rotate(grad_output, cos, sin.roll(half, dims=-1), sign=-1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """(a cos - sign b sin, b cos + sign a sin), written straight into the halves of the result."""
    dim = cos.shape[-1]
    half = dim // 2
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half:dim]
    if x.dtype == cos.dtype:
        torch.mul(x[..., :dim], cos, out=result[..., :dim])
        result[..., :half].addcmul_(second, sin[..., :half], value=-sign)
        result[..., half:dim].addcmul_(first, sin[..., half:], value=sign)
    else:
        wide = x[..., :dim] * cos
        wide[..., :half].addcmul_(second, sin[..., :half], value=-sign)
        wide[..., half:].addcmul_(first, sin[..., half:], value=sign)
        result[..., :dim] = wide
    if dim < x.shape[-1]:
        result[..., dim:] = x[..., dim:]
    return result
