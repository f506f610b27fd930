"""Masked words to find again, and whether two texts are in their order, with a BERT."""

from __future__ import annotations

import torch
from torch.nn import functional

from megallm.config.tree import Config
from megallm.layers.context import LayoutContext
from megallm.layers.embedding import vocabulary_cross_entropy
from megallm.model.bert import BERTStage, words_to_find
from megallm.model.embedding import Batch
from megallm.train.loss import LossTerm


class BERTTask:
    """Mean cross-entropy over the masked tokens, and with `next_sentence` that over the samples added to it."""

    def __init__(self, vocab_size: int, next_sentence: bool) -> None:
        self.vocab_size = vocab_size
        self.next_sentence = next_sentence
        # As in Megatron's log: the order of sentences.
        self.term_names: tuple[str, ...] = ("lm_loss", "sop_loss") if next_sentence else ("lm_loss",)

    @classmethod
    def from_config(cls, config: Config) -> BERTTask:
        """The task of a resolved configuration."""
        assert config.model.vocab_size, "the configuration is resolved"
        return cls(config.model.vocab_size, config.model.bert_binary_head)

    def build_stage(
        self, config: Config, layers: range, context: LayoutContext, *, is_first: bool, is_last: bool
    ) -> BERTStage:
        """One pipeline stage with the given layers, initialised."""
        stage = BERTStage(config, layers, context, is_first=is_first, is_last=is_last)
        stage.initialize()
        return stage

    def counts(self, batch: Batch) -> torch.Tensor:
        """Masked tokens, and samples: [terms]."""
        masked = batch["loss_mask"].sum()
        if not self.next_sentence:
            return masked.reshape(1)
        return torch.stack((masked, masked.new_full((), batch["tokens"].shape[0])))

    def loss_terms(self, outputs: tuple[torch.Tensor, ...], batch: Batch, context: LayoutContext) -> list[LossTerm]:
        """The sum of the masked tokens' cross-entropies, and that of the samples'."""
        losses = outputs[0]
        if losses.dim() == 3:  # logits [sequence, batch, vocabulary]
            losses = vocabulary_cross_entropy(
                losses, words_to_find(batch), self.vocab_size, context.tp, context.operators.of("cross_entropy")
            )
        terms = [LossTerm("lm_loss", 1.0, (losses * batch["loss_mask"].t()).sum())]
        if self.next_sentence:
            scores = outputs[1].to(losses.dtype)
            terms.append(
                LossTerm("sop_loss", 1.0, functional.cross_entropy(scores, batch["is_random"], reduction="sum"))
            )
        return terms
