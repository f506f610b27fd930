"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pairs of elements turned by an angle of their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megallm.ops.library import NATIVE, register_fakes

__all__ = ["apply_rotary", "apply_rotary_reference", "split_and_rotate", "split_and_rotate_reference"]


def apply_rotary(
    tensors: Sequence[Tensor], cosines: Tensor, sines: Tensor, interleaved: bool, implementation: str = "auto"
) -> tuple[Tensor, ...]:
    """Rotates the first `dim` elements of every head of tensors [sequence, batch, heads, head_dim]; the rest passes.

    All tensors, such as queries and keys, are of one dtype and differ in the number of heads alone. A pair is elements
    i and i + dim / 2 (GPT-NeoX, Llama), or 2 i and 2 i + 1 if `interleaved` (GPT-J). `cosines` and `sines` are
    [sequence, batch or 1, 1, dim], dim even and at most head_dim: those of the first elements of all pairs, then those
    of the second. With a pair (a, b), the result is (a cos - b sin, b cos + a sin). They receive no gradient.

    Computed in the wider dtype of tensors and tables, rounded once, returned contiguous. The native operator needs
    tables in float32, or float64 for float64. It reads any strides, and takes all tensors in one launch. The backward
    pass rotates by the opposite angle and keeps nothing but the tables. Raises ValueError when shapes do not fit.
    """
    _check(tensors, cosines, sines)
    if _is_native(tensors[0], cosines, implementation):
        return _Rotary.apply(cosines, sines, interleaved, *tensors)
    return apply_rotary_reference(tensors, cosines, sines, interleaved)


def apply_rotary_reference(
    tensors: Sequence[Tensor], cosines: Tensor, sines: Tensor, interleaved: bool
) -> tuple[Tensor, ...]:
    """The same as a composition of differentiable torch operators."""
    return tuple(_rotated(tensor, cosines, sines, interleaved) for tensor in tensors)


def split_and_rotate(
    packed: Tensor,
    heads: tuple[int, int, int],
    cosines: Tensor,
    sines: Tensor,
    interleaved: bool,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of one `packed` tensor [sequence, batch, features], the first two rotated.

    `heads` are the numbers of heads of each. Returns three tensors [sequence, batch, heads, head_dim]; the values may
    be a view of `packed`. Otherwise as `apply_rotary`. Natively the three gradients are written where they belong in
    that of `packed`, rotated back on the way.
    """
    _check(_split(packed, heads)[:2], cosines, sines)
    if _is_native(packed, cosines, implementation):
        return _SplitAndRotate.apply(packed, heads, cosines, sines, interleaved)
    return split_and_rotate_reference(packed, heads, cosines, sines, interleaved)


def split_and_rotate_reference(
    packed: Tensor, heads: tuple[int, int, int], cosines: Tensor, sines: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as a composition of differentiable torch operators."""
    query, key, value = _split(packed, heads)
    query, key = apply_rotary_reference((query, key), cosines, sines, interleaved)
    return query, key, value


def _check(tensors: Sequence[Tensor], cosines: Tensor, sines: Tensor) -> None:
    dim = cosines.shape[-1]
    for tensor in tensors:
        if cosines.shape != sines.shape or dim % 2 != 0 or dim > tensor.shape[-1]:
            raise ValueError(
                f"Rotary embedding needs cosines and sines of one shape with an even last dimension of at most the "
                f"head's {tensor.shape[-1]}, but they are {tuple(cosines.shape)} and {tuple(sines.shape)}."
            )


def _is_native(tensor: Tensor, cosines: Tensor, implementation: str) -> bool:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return cosines.dtype == wide and cosines.shape[-1] > 0 and NATIVE.serves("rotary", tensor, implementation)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    dim = cosines.shape[-1]
    half = dim // 2
    pairs, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        first, second = pairs[..., 0::2], pairs[..., 1::2]
    else:
        first, second = pairs[..., :half], pairs[..., half:]
    turned_first = first * cosines[..., :half] - second * sines[..., :half]
    turned_second = second * cosines[..., half:] + first * sines[..., half:]
    if interleaved:
        turned = torch.stack((turned_first, turned_second), dim=-1).flatten(-2)  # [.., half, 2] -> [.., dim]
    else:
        turned = torch.cat((turned_first, turned_second), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _split(packed: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """[sequence, batch, features] -> three views [sequence, batch, heads, head_dim]."""
    head_dim = packed.shape[-1] // sum(heads)
    query, key, value = (
        part.unflatten(-1, (count, head_dim))
        for part, count in zip(packed.split([count * head_dim for count in heads], dim=-1), heads, strict=True)
    )
    return query, key, value


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cosines: Tensor, sines: Tensor, interleaved: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cosines, sines)
        ctx.interleaved = interleaved
        rotated = [tensor.new_empty(tensor.shape) for tensor in tensors]
        torch.ops.megallm.rotary_(list(tensors), rotated, cosines, sines, interleaved, False)
        return tuple(rotated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        rotated = [grad.new_empty(grad.shape) for grad in grads]
        torch.ops.megallm.rotary_(list(grads), rotated, cosines, sines, ctx.interleaved, True)
        return None, None, None, *rotated


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, heads: tuple[int, int, int], cosines: Tensor, sines: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        ctx.shape, ctx.heads, ctx.interleaved = packed.shape, heads, interleaved
        query, key, value = _split(packed, heads)
        rotated = [query.new_empty(query.shape), key.new_empty(key.shape)]
        torch.ops.megallm.rotary_([query, key], rotated, cosines, sines, interleaved, False)
        return rotated[0], rotated[1], value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        grad_packed = grads[0].new_empty(ctx.shape)
        query, key, value = _split(grad_packed, ctx.heads)
        torch.ops.megallm.rotary_(list(grads[:2]), [query, key], cosines, sines, ctx.interleaved, True)
        value.copy_(grads[2])
        return grad_packed, None, None, None, None


def _fake_rotary(
    inputs: list[Tensor], outputs: list[Tensor], cosines: Tensor, sines: Tensor, interleaved: bool, inverse: bool
) -> None:
    return None


register_fakes({"rotary_": _fake_rotary})
