"""Dropout of hidden states, with the additions around it."""

from __future__ import annotations

import torch
from torch import nn

from megallm.layers.context import LayoutContext, SequenceContext
from megallm.ops import Dropout, dropout_add
from megallm.random import stream_key


class HiddenDropout(nn.Module):
    """Dropout of hidden states [local sequence, batch, hidden], by itself or on their way to a residual."""

    key: torch.Tensor

    def __init__(self, name: str, probability: float, context: LayoutContext) -> None:
        super().__init__()
        self.probability = probability
        self.implementation = context.operators.of("dropout_add")
        self.register_buffer("key", stream_key(context.seed, f"dropout/{name}", context.device), persistent=False)

    def forward(self, hidden: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
        dropout = self._of(sequence)
        return hidden if dropout is None else dropout_add(hidden, dropout, implementation=self.implementation)

    def onto(
        self, residual: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor | None, sequence: SequenceContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`residual` + dropout(`branch` + `bias`) as two summands, of which the second may be None.

        Dropout adds on its way, and one is left. Without it the two are left to the norm that follows, which does.
        """
        dropout = self._of(sequence)
        if dropout is not None:
            return dropout_add(branch, dropout, bias, residual, self.implementation), None
        return residual, branch if bias is None else branch + bias

    def _of(self, sequence: SequenceContext) -> Dropout | None:
        """What is dropped, or None where dropout is off."""
        if self.probability == 0.0 or sequence.step is None:
            return None
        return Dropout(self.probability, self.key, sequence.step, sequence.token_rows)
