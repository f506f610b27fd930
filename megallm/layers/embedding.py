"""Word embedding and cross-entropy over a vocabulary that is cut over the tensor parallel ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megallm.communication import Group
from megallm.layers.context import LayoutContext, WeightGradients
from megallm.layers.regions import scatter_sum_sequence, sum_over_group
from megallm.ops.cross_entropy import CrossEntropy, Reduce, TokenLosses, token_losses
from megallm.ops.embedding import add_rows
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
    """Rows of a table; zeros for a row below 0, where some are absent.

    Gradients of a token that occurs often are summed in float32: 16 bits would lose most of them.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: nn.Parameter, rows: torch.Tensor, weight_gradients: WeightGradients, some_are_absent: bool
    ) -> torch.Tensor:
        ctx.weight, ctx.weight_gradients = weight, weight_gradients
        ctx.save_for_backward(rows)
        if not some_are_absent:
            return functional.embedding(rows, weight)
        found = functional.embedding(rows.clamp(min=0), weight)
        return found.masked_fill_((rows < 0).unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return ctx.weight_gradients.compute_rows(ctx.weight, rows, grad), None, None, None


class _AddPositions(torch.autograd.Function):
    """`hidden + table[rows]`, the table's gradient handed to the context where the table is a parameter."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        table: torch.Tensor,
        rows: torch.Tensor,
        weight_gradients: WeightGradients,
        implementation: str,
    ) -> torch.Tensor:
        ctx.table, ctx.weight_gradients = table, weight_gradients
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(rows)
        return add_rows(hidden, table, rows, implementation)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_table = None
        if ctx.needs_input_grad[1]:
            grad_table = ctx.weight_gradients.compute_rows(ctx.table, *ctx.saved_tensors, grad)
        return grad, grad_table, None, None, None


def add_positions(
    hidden: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, context: LayoutContext
) -> torch.Tensor:
    """Adds a row of a table of positions or types, learned or not, to each token: hidden [sequence, batch, hidden].

    table [entries, hidden]; positions int64 [sequence, batch].
    """
    return _AddPositions.apply(hidden, table, positions, context.weight_gradients, context.operators.of("add_rows"))


def embed_tokens(tokens: torch.Tensor, weight: nn.Parameter, context: LayoutContext) -> torch.Tensor:
    """Rows of the embedding: tokens int64 [batch, sequence] -> [sequence (/ tp), batch, hidden].

    A rank looks up the tokens whose rows it holds; the others count as zero in the sum over ranks. Ids are not checked
    here: datasets did.
    """
    group = context.tp
    rows = tokens.t()  # [batch, sequence] -> [sequence, batch]
    if group.size > 1:
        rows = rows - group.rank * weight.shape[0]
        rows = rows.masked_fill_((rows < 0) | (rows >= weight.shape[0]), -1)
    hidden = _Lookup.apply(weight, rows, context.weight_gradients, group.size > 1)
    return scatter_sum_sequence(hidden, group) if context.sequence_parallel else sum_over_group(hidden, group)


def vocabulary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, loss: CrossEntropy, group: Group, implementation: str = "auto"
) -> TokenLosses:
    """The losses of each token, in nats: [sequence, batch], float32 or float64.

    logits: [sequence, batch, padded vocabulary / tp]; the backward pass writes their gradient over them; columns from
        `loss.vocab_size` on are padding and get no probability.
    targets: int64 [sequence, batch], below `loss.vocab_size`; -100 for a token that has no loss.
    loss: what it is where one rank has the whole vocabulary.
    """
    return token_losses(logits, targets, loss_over(group, loss, logits.shape[-1]), implementation)


def loss_over(group: Group, loss: CrossEntropy, columns: int) -> CrossEntropy:
    """The loss over a vocabulary of which each rank of the group holds `columns`, the last ones perhaps padding."""
    return replace(loss, first=group.rank * columns, reduce=_reduction_over(group))


def _reduction_over(group: Group) -> Reduce:
    def reduce(tensor: torch.Tensor, reduction: str) -> None:
        group.all_reduce(tensor, reduction)

    return reduce
