"""What the engine asks of a task."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from megallm.config.tree import Config
from megallm.layers.context import LayoutContext
from megallm.train.loss import LossTerm

Batch = dict[str, torch.Tensor]


class Task(Protocol):
    """A model and its loss. Terms are always named and ordered as in `term_names`."""

    term_names: tuple[str, ...]

    def build_stage(
        self, config: Config, layers: range, context: LayoutContext, *, is_first: bool, is_last: bool
    ) -> nn.Module:
        """One pipeline stage with the given layers, initialised."""
        ...

    def counts(self, batch: Batch) -> torch.Tensor:
        """What each loss term counts in a micro-batch: [terms]."""
        ...

    def loss_terms(self, outputs: tuple[torch.Tensor, ...], batch: Batch, context: LayoutContext) -> list[LossTerm]:
        """The terms of a micro-batch from the last stage's outputs."""
        ...
