"""Output layer and cross-entropy in chunks of tokens: the logits of a micro-batch never exist all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megallm.layers.context import LayoutContext
from megallm.layers.regions import gather_first_dim, reduce_scatter_first_dim
from megallm.ops.cross_entropy import (
    CrossEntropy,
    TokenLosses,
    local_statistics,
    logit_gradients_,
    statistics_over_ranks,
)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: nn.Parameter,
    targets: torch.Tensor,
    loss: CrossEntropy,
    context: LayoutContext,
    chunk_size: int,
    bias: nn.Parameter | None = None,
) -> TokenLosses:
    """Cross-entropy of the product of `hidden` and `weight`, which is made for `chunk_size` tokens at a time.

    hidden: [sequence (/ tp), batch, hidden], the same as for `column_parallel_linear`.
    weight: [padded vocabulary / tp, hidden]; bias: [padded vocabulary / tp], added to the logits, or None.
    targets: int64 [sequence, batch].
    loss: what the loss of a token is, over the vocabulary of `context.tp` (see `loss_over`).

    Returns the losses of each token: [sequence, batch], float32 or float64. Only the input and two numbers of each
    token are kept: the backward pass makes each chunk's logits again, writes their gradient over them, and hands on the
    chunk's part of both products' gradients. That costs a third of the output layer's time once more.
    """
    return TokenLosses(*_ChunkedLoss.apply(hidden, weight, bias, targets, loss, context, chunk_size))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        targets: torch.Tensor,
        loss: CrossEntropy,
        context: LayoutContext,
        chunk_size: int,
    ) -> tuple[torch.Tensor, ...]:
        rows, labels = _input_rows(hidden, context), targets.reshape(-1)
        parts = [
            local_statistics(functional.linear(chunk, weight, bias), own, loss, context.operators.of("cross_entropy"))
            for chunk, own in zip(rows.split(chunk_size), labels.split(chunk_size), strict=True)
        ]
        largest = torch.cat([largest for largest, _ in parts])
        sums = torch.cat([sums for _, sums in parts], dim=1)  # [3, tokens]
        statistics = statistics_over_ranks(largest, sums, labels, loss)
        # The parameters themselves, not saved copies: the sink knows them.
        ctx.weight, ctx.bias, ctx.loss, ctx.context, ctx.chunk_size = weight, bias, loss, context, chunk_size
        ctx.save_for_backward(hidden, targets, statistics.largest, statistics.exponentials)
        objective, *told = (each.view(targets.shape) for each in statistics.losses.tensors())
        ctx.mark_non_differentiable(*told)
        ctx.set_materialize_grads(False)
        return objective, *told

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: torch.Tensor, *of_what_is_told: None) -> tuple[torch.Tensor | None, ...]:
        hidden, targets, *statistics = ctx.saved_tensors
        weight, bias, context = ctx.weight, ctx.bias, ctx.context
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = _input_rows(hidden, context)
        grad_rows = torch.empty_like(rows)
        grad_weight = grad_bias = None
        whole = (rows, grad_rows, targets.reshape(-1), grad_losses.reshape(-1), *statistics)
        for chunk, grad_chunk, labels, grad, *own in zip(*(it.split(ctx.chunk_size) for it in whole), strict=True):
            logits = functional.linear(chunk, weight, bias)
            logit_gradients_(logits, labels, tuple(own), grad, ctx.loss, context.operators.of("cross_entropy"))
            if needs_hidden:
                torch.matmul(logits, weight, out=grad_chunk)
            if needs_weight:
                grad_weight = context.weight_gradients.add_part(grad_weight, weight, logits, chunk)
            if needs_bias:
                part = logits.sum(0, dtype=grad.dtype)
                grad_bias = part if grad_bias is None else grad_bias.add_(part)
        return (
            _input_gradient(grad_rows, hidden, context) if needs_hidden else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            *(None,) * 4,
        )


def _input_rows(hidden: torch.Tensor, context: LayoutContext) -> torch.Tensor:
    """[sequence (/ tp), batch, hidden] -> [tokens, hidden], of all tokens."""
    whole = gather_first_dim(hidden, context.tp) if context.sequence_parallel else hidden
    return whole.flatten(0, 1)


def _input_gradient(grad_rows: torch.Tensor, hidden: torch.Tensor, context: LayoutContext) -> torch.Tensor:
    """Sum over the ranks: [tokens, hidden] -> [sequence (/ tp), batch, hidden]."""
    grad = grad_rows.view(-1, *hidden.shape[1:])
    if context.sequence_parallel:
        return reduce_scatter_first_dim(grad, context.tp)
    context.tp.all_reduce(grad)
    return grad
