"""Softmax of attention scores, scaled and masked."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["scaled_masked_softmax", "scaled_masked_softmax_reference"]


def scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Softmax over the keys of scale * `scores` [batch, heads, queries, keys]; masked positions get probability 0.

    `mask` is bool, True where masked, of a shape that broadcasts to that of the scores. With `causal`, query i sees the
    keys up to i + keys - queries, so that the last query sees all of them. A row with every position masked is 0
    throughout. Computed in float32 (float64 for float64), returned in the dtype of the scores; keeps only the result
    for the backward pass. Raises ValueError for a mask of another dtype.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"The attention mask must be bool, True where masked, not {mask.dtype}.")
    return _ScaledMaskedSoftmax.apply(scores, _merge_masks(scores, mask, causal), scale)


def scaled_masked_softmax_reference(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The same as a composition of differentiable torch operators."""
    wide = scores.to(_wide_dtype(scores)) * scale
    masked = _merge_masks(scores, mask, causal)
    if masked is None:
        return torch.softmax(wide, dim=-1).to(scores.dtype)
    # A finite value keeps the gradient of an all-masked row finite; such a row is uniform here, and zeroed like all
    # masked positions.
    wide = wide.masked_fill(masked, torch.finfo(wide.dtype).min)
    return torch.softmax(wide, dim=-1).masked_fill(masked, 0.0).to(scores.dtype)


def _wide_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _merge_masks(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The given mask and the causal one as a single mask, in the smallest shape that broadcasts."""
    if not causal:
        return mask
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu_(keys - queries + 1)
    return future if mask is None else mask | future


class _ScaledMaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, masked: Tensor | None, scale: float) -> Tensor:
        wide = torch.mul(scores.to(_wide_dtype(scores)), scale)
        if masked is None:
            probabilities = torch.softmax(wide, dim=-1)
        else:
            # With a finite value the softmax of an all-masked row is defined, and the second filling makes it zero.
            # Other rows are zero at these positions already.
            wide.masked_fill_(masked, torch.finfo(wide.dtype).min)
            probabilities = torch.softmax(wide, dim=-1).masked_fill_(masked.all(dim=-1, keepdim=True), 0.0)
        probabilities = probabilities.to(scores.dtype)
        ctx.save_for_backward(probabilities)
        ctx.scale = scale
        return probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (probabilities,) = ctx.saved_tensors
        # p = 0 at masked positions, and so is p (g - sum(g p)): the mask is not needed again.
        grad = torch._softmax_backward_data(grad_output, probabilities, -1, probabilities.dtype)
        return grad.mul_(ctx.scale), None, None
