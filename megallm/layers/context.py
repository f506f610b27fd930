"""What a layer is given: how it is laid out when it is built, and what the sequences are when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megallm.communication import Group
from megallm.config.operators import OperatorChoices
from megallm.layers.cache import KeyValueCache
from megallm.layers.positions import Rotation
from megallm.ops.accumulate import accumulate_weight_gradient
from megallm.ops.embedding import accumulate_rows

# (weight, gradient of the output [tokens, out], input [tokens, in]) -> None: adds their product to where the weight's
# gradient is kept.
ProductSink = Callable[[torch.nn.Parameter, torch.Tensor, torch.Tensor], None]
# (table, numbers of rows, gradients of these rows) -> None: adds them to where the table's gradient is kept.
RowSink = Callable[[torch.nn.Parameter, torch.Tensor, torch.Tensor], None]


class WeightGradients:
    """Computes the weight gradients of linear layers and embeddings.

    By itself it hands them to autograd. A `sink` may take a linear layer's two factors instead and accumulate their
    product where the gradient is kept, or put it off; a `row_sink` takes what a table's rows get. Both sum in the wide
    dtype of what they add to.
    """

    def __init__(self) -> None:
        self.sink: ProductSink | None = None
        self.row_sink: RowSink | None = None

    def compute(
        self, weight: torch.nn.Parameter, grad_output: torch.Tensor, input: torch.Tensor
    ) -> torch.Tensor | None:
        """Gradient of `weight` [out, in] for autograd, or None if the sink took it.

        `grad_output` [..., out], `input` [..., in].
        """
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])  # [..., out] -> [tokens, out]
        input_rows = input.reshape(-1, input.shape[-1])  # [..., in] -> [tokens, in]
        if self.sink is None:
            return grad_rows.t().matmul(input_rows)
        self.sink(weight, grad_rows, input_rows)
        return None

    def add_part(
        self,
        total: torch.Tensor | None,
        weight: torch.nn.Parameter,
        grad_output: torch.Tensor,
        input: torch.Tensor,
    ) -> torch.Tensor | None:
        """One part of the gradient of `weight` [out, in], of which `total`, wide, is the sum so far; None at first.

        `grad_output` [tokens, out], `input` [tokens, in]. Returns the new sum, or None if the sink takes the parts.
        """
        if self.sink is not None:
            self.sink(weight, grad_output, input)
            return None
        if total is None:
            total = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
        accumulate_weight_gradient(total, grad_output, input)
        return total

    def compute_rows(
        self, table: torch.nn.Parameter, rows: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor | None:
        """Gradient of `table` [entries, width] for autograd, or None if the sink took it.

        Entry `rows` [...] was used where `gradient` [..., width] is the gradient; rows below 0 were not.
        """
        if self.row_sink is None:
            total = torch.zeros(table.shape, dtype=_wide(table), device=table.device)
            accumulate_rows(total, gradient, rows)
            return total.to(table.dtype)
        self.row_sink(table, rows, gradient)
        return None


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass
class LayoutContext:
    """How layers are laid out and made.

    With `sequence_parallel`, tensors between the linear layers hold this rank's part of the sequence: [sequence / tp,
    batch, hidden]. `operators` says which implementation of each operator to use.
    """

    tp: Group
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    seed: int
    weight_gradients: WeightGradients = field(default_factory=WeightGradients)
    operators: OperatorChoices = field(default_factory=OperatorChoices)

    @property
    def partial_axes(self) -> tuple[str, ...]:
        """Axes over which a replicated parameter sees only part of the tokens."""
        return ("tp",) if self.sequence_parallel else ()


@dataclass
class SequenceContext:
    """What every layer may ask about the sequences of one micro-batch. Everything here is made once and passed down.

    Attributes:
        sample_ids: int64 [batch], number of each sequence within the global batch; random numbers are keyed by it.
        sequence_length: tokens in a sequence, over all tensor ranks.
        local_positions: int64 [local sequence], places within the sequence of the tokens this rank holds between
            linear layers.
        rotation: turns queries and keys by their positions; None in a model without rotary positions.
        allowed: bool [batch, 1, sequence, sequence], True where attention may look, or None for plain causal attention.
        step: int64 scalar tensor, the training step, keys dropout; None where dropout is off.
        cache: keys and values of earlier tokens, which these follow, while a text is written; else None.
    """

    sample_ids: torch.Tensor
    sequence_length: int
    local_positions: torch.Tensor
    rotation: Rotation | None = None
    allowed: torch.Tensor | None = None
    step: torch.Tensor | None = None
    cache: KeyValueCache | None = None
    _score_rows: torch.Tensor | None = field(default=None, init=False, repr=False)

    @cached_property
    def token_rows(self) -> torch.Tensor:
        """Global number of each local token in the batch: int64 [local sequence, batch]. One tensor for all layers."""
        return self.sample_ids.unsqueeze(0) * self.sequence_length + self.local_positions.unsqueeze(1)

    def score_rows(self, num_heads: int, local_heads: range) -> torch.Tensor:
        """Global number of each row of attention scores: int64 [batch, local heads, sequence].

        `num_heads` of all tensor ranks, of which `local_heads` are this one's. One tensor for all layers, which are
        alike.
        """
        if self._score_rows is None:
            device = self.sample_ids.device
            heads = torch.arange(local_heads.start, local_heads.stop, device=device)
            positions = torch.arange(self.sequence_length, device=device)
            rows = self.sample_ids.unsqueeze(-1) * num_heads + heads  # [batch, local heads]
            self._score_rows = rows.unsqueeze(-1) * self.sequence_length + positions
        return self._score_rows
