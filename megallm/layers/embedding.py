"""Word embedding and cross-entropy over a vocabulary that is cut over the tensor parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megallm.communication import Group
from megallm.layers.context import LayoutContext, WeightGradients
from megallm.layers.regions import scatter_sum_sequence, sum_over_group
from megallm.parameter import Description, InitialMethod, make_parameter, padded_part


def padded_vocab_size(vocab_size: int, multiple: int, tensor_parallel_size: int) -> int:
    """The vocabulary's rows in storage: the next multiple of `multiple` x tensor parallel size."""
    unit = multiple * tensor_parallel_size
    return (vocab_size + unit - 1) // unit * unit


def vocabulary_parameter(
    name: str,
    vocab_size: int,
    padded_size: int,
    hidden_size: int,
    context: LayoutContext,
    initial: InitialMethod,
    tie: str | None = None,
    counts: bool = True,
) -> nn.Parameter:
    """A [vocabulary, hidden] matrix of which this rank holds padded_size / tp rows."""
    piece = padded_part(name, (vocab_size, hidden_size), padded_size, context.tp.size, context.tp.rank)
    initial_values = initial((vocab_size, hidden_size))
    description = Description((piece,), initial_values, tie=tie, counts=counts, of_vocabulary=True)
    return make_parameter(description, context.dtype, context.device)


def vocabulary_bias(name: str, vocab_size: int, padded_size: int, context: LayoutContext) -> nn.Parameter:
    """A [vocabulary] vector of zeros, cut as `vocabulary_parameter` cuts its rows."""
    piece = padded_part(name, (vocab_size,), padded_size, context.tp.size, context.tp.rank)
    return make_parameter(Description((piece,), decays=False), context.dtype, context.device)


class _Lookup(torch.autograd.Function):
    """Rows of a table.

    Gradients of a token that occurs often are summed in float32: 16 bits would lose most of them.
    """

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, rows: torch.Tensor, weight_gradients: WeightGradients) -> torch.Tensor:
        ctx.weight, ctx.weight_gradients = weight, weight_gradients
        ctx.save_for_backward(rows)
        return functional.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (rows,) = ctx.saved_tensors
        wide = grad if grad.dtype == torch.float64 else grad.float()
        gradient = torch.ops.aten.embedding_dense_backward(wide, rows, ctx.weight.shape[0], -1, False)
        return ctx.weight_gradients.add(ctx.weight, gradient), None, None


def embed_tokens(tokens: torch.Tensor, weight: nn.Parameter, context: LayoutContext) -> torch.Tensor:
    """Rows of the embedding: tokens int64 [batch, sequence] -> [sequence (/ tp), batch, hidden].

    A rank looks up the tokens whose rows it holds; the others count as zero in the sum over ranks. Ids are not checked
    here: datasets did.
    """
    group = context.tp
    tokens = tokens.t()  # [batch, sequence] -> [sequence, batch]
    if group.size == 1:
        return _Lookup.apply(weight, tokens, context.weight_gradients)
    local = tokens - group.rank * weight.shape[0]
    absent = (local < 0) | (local >= weight.shape[0])
    hidden = _Lookup.apply(weight, local.masked_fill(absent, 0), context.weight_gradients)
    hidden = hidden.masked_fill(absent.unsqueeze(-1), 0.0)
    return scatter_sum_sequence(hidden, group) if context.sequence_parallel else sum_over_group(hidden, group)


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, group: Group) -> torch.Tensor:
        # float32 at least: the sum of exponentials of a large vocabulary does not fit 16 bits.
        exponentials = logits if logits.dtype == torch.float64 else logits.float()
        if exponentials.data_ptr() == logits.data_ptr():
            # The logits are used by nothing else, and the product that made them does not need them in its backward
            # pass.
            exponentials = logits.detach()
        first = group.rank * logits.shape[-1]
        if first + logits.shape[-1] > vocab_size:
            exponentials[..., max(0, vocab_size - first) :] = -torch.inf
        largest = exponentials.amax(dim=-1)
        group.all_reduce(largest, "max")
        exponentials.sub_(largest.unsqueeze(-1))
        local = targets - first
        absent = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(absent, 0)
        predicted = exponentials.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(absent, 0.0)
        exponentials.exp_()
        sums = torch.stack((exponentials.sum(dim=-1), predicted))
        group.all_reduce(sums)
        ctx.save_for_backward(exponentials, sums[0], local, absent)
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        exponentials, sums, local, absent = ctx.saved_tensors
        # Written over the exponentials: one pass less, and each loss is differentiated once.
        grad_logits = exponentials.mul_((grad / sums).unsqueeze(-1))
        at_target = (-grad).masked_fill(absent, 0.0)
        grad_logits.scatter_add_(-1, local.unsqueeze(-1), at_target.unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None, None


def vocabulary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, group: Group
) -> torch.Tensor:
    """Cross-entropy of each token, in nats, float32 or float64.

    logits: [sequence, batch, padded vocabulary / tp], overwritten; columns from `vocab_size` on are padding and get no
        probability.
    targets: int64 [sequence, batch], below `vocab_size`.
    """
    return _VocabularyCrossEntropy.apply(logits, targets, vocab_size, group)
