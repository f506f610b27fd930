"""Softmax of attention scores, scaled, masked, and with dropout.

For attention that goes through its scores: `scaled_dot_product_attention` of torch has no masks of dropout that are
functions of the element. Not differentiable twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megallm.ops.dropout import Dropout, dropped_reference
from megallm.ops.library import NATIVE, register_fakes

__all__ = ["scaled_masked_softmax", "scaled_masked_softmax_reference"]


def scaled_masked_softmax(
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    *,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Softmax over the keys of scale * `scores` + `bias`; masked positions get probability 0, then comes dropout.

    `scores` [batch, heads, queries, keys], or without the first or the first two dims, is float32, bfloat16, float16 or
    float64. `mask` is bool, True where masked, and `bias` has the dtype of the scores; both have any shape that
    broadcasts to theirs. With `causal`, query i sees the keys up to i + keys - queries, so that the last query sees all
    of them. `dropout.rows` is [batch, heads, queries].

    Positions of -inf count as masked, and a row with every position masked is 0 throughout. Computed in float32
    (float64 for float64), returned in the dtype of the scores. For the backward pass the native operator keeps the
    probabilities before dropout and nothing else. Raises ValueError when shapes or dtypes do not fit.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"The attention mask must be bool, True where masked, not {mask.dtype}.")
    if bias is not None and bias.dtype != scores.dtype:
        raise ValueError(f"The attention bias must have the dtype of the scores, {scores.dtype}, not {bias.dtype}.")
    if not 2 <= scores.dim() <= 4:
        raise ValueError(f"Scores have 2 to 4 dims, the last of them queries and keys, not {tuple(scores.shape)}.")
    for name, beside in (("mask", mask), ("bias", bias)):
        if beside is not None and not _broadcasts(beside, scores):
            raise ValueError(
                f"The attention {name} must broadcast to the shape of the scores, but the scores are "
                f"{tuple(scores.shape)} and the {name} {tuple(beside.shape)}."
            )
    if dropout is not None and dropout.rows.shape != scores.shape[:-1]:
        raise ValueError(
            f"Dropout needs a number for each row, but the scores are {tuple(scores.shape)} and the numbers "
            f"{tuple(dropout.rows.shape)}."
        )
    if NATIVE.serves("softmax", scores, implementation):
        return _ScaledMaskedSoftmax.apply(scores, mask, bias, scale, causal, dropout)
    return scaled_masked_softmax_reference(scores, mask, scale, causal, bias=bias, dropout=dropout)


def _broadcasts(beside: Tensor, scores: Tensor) -> bool:
    pairs = zip(reversed(beside.shape), reversed(scores.shape), strict=False)
    return beside.dim() <= scores.dim() and all(size in (1, wanted) for size, wanted in pairs)


def scaled_masked_softmax_reference(
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    *,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """The same as a composition of differentiable torch operators."""
    wide = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32) * scale
    if bias is not None:
        wide = wide + bias
    masked = _merge_masks(scores, mask, causal)
    if masked is not None:
        wide = wide.masked_fill(masked, -torch.inf)
    # A row of which nothing is left has no largest element to subtract: it counts as zeros, and becomes them again.
    nothing = wide.detach().amax(dim=-1, keepdim=True) == -torch.inf if wide.shape[-1] else None
    if nothing is not None:
        wide = wide.masked_fill(nothing, 0.0)
    probabilities = torch.softmax(wide, dim=-1)
    if nothing is not None:
        probabilities = probabilities.masked_fill(nothing, 0.0)
    probabilities = probabilities.to(scores.dtype)
    return probabilities if dropout is None else dropped_reference(probabilities, dropout)


def _merge_masks(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The given mask and the causal one as a single mask, in the smallest shape that broadcasts."""
    if not causal:
        return mask
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu_(keys - queries + 1)
    return future if mask is None else mask | future


def _stretched(beside: Tensor | None, scores: Tensor) -> Tensor | None:
    """A view of the shape of the scores, whose keys lie next to each other: only these are copied where they do not."""
    if beside is None:
        return None
    if beside.dim() == 0 or beside.shape[-1] != scores.shape[-1] or beside.stride(-1) != 1:
        beside = beside.expand(*beside.shape[:-1], scores.shape[-1]).contiguous()
    return beside.expand(scores.shape)


class _ScaledMaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: float,
        causal: bool,
        dropout: Dropout | None,
    ) -> Tensor:
        probability, *places = (0.0, None, None, None) if dropout is None else dropout
        ctx.scale, ctx.causal, ctx.probability = scale, causal, probability
        ctx.bias_shape = None if bias is None else bias.shape
        probabilities, dropped = torch.ops.megallm.softmax_forward(
            scores, _stretched(mask, scores), _stretched(bias, scores), scale, causal, *places, probability
        )
        ctx.save_for_backward(probabilities, *places)
        return probabilities if dropout is None else dropped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, *places = ctx.saved_tensors
        wants_bias = ctx.needs_input_grad[2]
        # p = 0 at masked positions, and so is p (g - sum(g p)): the mask is not needed again.
        grad = torch.ops.megallm.softmax_backward(
            grad_output, probabilities, 1.0 if wants_bias else ctx.scale, ctx.causal, *places, ctx.probability
        )
        if not wants_bias:
            return grad, None, None, None, None, None
        return grad * ctx.scale, None, grad.sum_to_size(ctx.bias_shape), None, None, None


def _fake_forward(
    scores: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    key: Tensor | None,
    step: Tensor | None,
    rows: Tensor | None,
    drop: float,
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), scores.new_empty(0 if key is None else scores.shape)


def _fake_backward(
    grad_output: Tensor,
    probabilities: Tensor,
    scale: float,
    causal: bool,
    key: Tensor | None,
    step: Tensor | None,
    rows: Tensor | None,
    drop: float,
) -> Tensor:
    return grad_output.new_empty(grad_output.shape)


register_fakes({"softmax_forward": _fake_forward, "softmax_backward": _fake_backward})
