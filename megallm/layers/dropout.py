"""Dropout of hidden states, with the additions around it."""

from __future__ import annotations

import torch
from torch import nn

from megallm.layers.context import LayoutContext, SequenceContext
from megallm.ops import Dropout, dropout_add
from megallm.random import stream_key


class HiddenDropout(nn.Module):
    """Dropout of hidden states [local sequence, batch, hidden], once a bias is added, then added to a residual."""

    key: torch.Tensor

    def __init__(self, name: str, probability: float, context: LayoutContext) -> None:
        super().__init__()
        self.probability = probability
        self.implementation = context.operators.of("dropout_add")
        self.register_buffer("key", stream_key(context.seed, f"dropout/{name}", context.device), persistent=False)

    def of(self, sequence: SequenceContext) -> Dropout | None:
        """What is dropped, or None where dropout is off."""
        if self.probability == 0.0 or sequence.step is None:
            return None
        return Dropout(self.probability, self.key, sequence.step, sequence.token_rows)

    def forward(
        self,
        hidden: torch.Tensor,
        sequence: SequenceContext,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dropout = self.of(sequence)
        if dropout is not None:
            return dropout_add(hidden, dropout, bias, residual, self.implementation)
        if bias is not None:
            hidden = hidden + bias
        return hidden if residual is None else residual + hidden
