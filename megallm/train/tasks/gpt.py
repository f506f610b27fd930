"""Next-token prediction with a decoder-only transformer."""

from __future__ import annotations

import torch

from megallm.config.tree import Config
from megallm.layers.context import LayoutContext
from megallm.layers.embedding import vocabulary_cross_entropy
from megallm.model.embedding import Batch
from megallm.model.gpt import GPTStage
from megallm.train.loss import LossTerm


class GPTTask:
    """Mean cross-entropy over the tokens that the loss mask lets count."""

    term_names: tuple[str, ...] = ("lm_loss",)

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @classmethod
    def from_config(cls, config: Config) -> GPTTask:
        """The task of a resolved configuration."""
        assert config.model.vocab_size, "the configuration is resolved"
        return cls(config.model.vocab_size)

    def build_stage(
        self, config: Config, layers: range, context: LayoutContext, *, is_first: bool, is_last: bool
    ) -> GPTStage:
        """One pipeline stage with the given layers, initialised."""
        stage = GPTStage(config, layers, context, is_first=is_first, is_last=is_last)
        stage.initialize()
        return stage

    def counts(self, batch: Batch) -> torch.Tensor:
        """Tokens that count: [1]."""
        return batch["loss_mask"].sum().reshape(1)

    def loss_terms(self, outputs: tuple[torch.Tensor, ...], batch: Batch, context: LayoutContext) -> list[LossTerm]:
        """The sum of the counting tokens' cross-entropies."""
        losses = outputs[0]
        if losses.dim() == 3:  # logits [sequence, batch, vocabulary]
            labels = batch["labels"].t()  # [batch, sequence] -> [sequence, batch]
            losses = vocabulary_cross_entropy(
                losses, labels, self.vocab_size, context.tp, context.operators.of("cross_entropy")
            )
        return [LossTerm("lm_loss", 1.0, (losses * batch["loss_mask"].t()).sum())]
