"""Next-token prediction with a decoder-only transformer."""

from __future__ import annotations

import torch

from megallm.config.tree import Config
from megallm.layers.context import LayoutContext
from megallm.model.embedding import Batch
from megallm.model.gpt import GPTStage
from megallm.model.word_loss import word_loss
from megallm.ops.cross_entropy import CrossEntropy
from megallm.train.loss import LossTerm
from megallm.train.tasks.words import word_term_names, word_terms


class GPTTask:
    """Mean cross-entropy over the tokens that the loss mask lets count."""

    def __init__(self, loss: CrossEntropy) -> None:
        self.loss = loss
        self.term_names = word_term_names(loss)

    @classmethod
    def from_config(cls, config: Config) -> GPTTask:
        """The task of a resolved configuration."""
        return cls(word_loss(config))

    def build_stage(
        self, config: Config, layers: range, context: LayoutContext, *, is_first: bool, is_last: bool
    ) -> GPTStage:
        """One pipeline stage with the given layers, initialised."""
        stage = GPTStage(config, layers, context, is_first=is_first, is_last=is_last)
        stage.initialize()
        return stage

    def counts(self, batch: Batch) -> torch.Tensor:
        """Tokens that count: [terms]."""
        return batch["loss_mask"].sum().expand(len(self.term_names))

    def loss_terms(self, outputs: tuple[torch.Tensor, ...], batch: Batch, context: LayoutContext) -> list[LossTerm]:
        """The sum of the counting tokens' cross-entropies."""
        labels = batch["labels"].t()  # [batch, sequence] -> [sequence, batch]
        return word_terms(outputs, labels, batch, self.loss, context)
