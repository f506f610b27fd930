"""Masked words to find again, and whether two texts are in their order, with a BERT."""

from __future__ import annotations

import torch
from torch.nn import functional

from megallm.config.tree import Config
from megallm.layers.context import LayoutContext
from megallm.model.bert import BERTStage, words_to_find
from megallm.model.embedding import Batch
from megallm.model.word_loss import word_loss
from megallm.ops.cross_entropy import CrossEntropy
from megallm.train.loss import LossTerm
from megallm.train.tasks.words import word_term_names, word_terms


class BERTTask:
    """Mean cross-entropy over the masked tokens, and with `next_sentence` that over the samples added to it."""

    def __init__(self, loss: CrossEntropy, next_sentence: bool) -> None:
        self.loss = loss
        self.next_sentence = next_sentence
        # As in Megatron's log: the order of sentences.
        self.term_names = (*word_term_names(loss), *(("sop_loss",) if next_sentence else ()))

    @classmethod
    def from_config(cls, config: Config) -> BERTTask:
        """The task of a resolved configuration."""
        return cls(word_loss(config), config.model.bert_binary_head)

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
        samples = masked.new_full((), batch["tokens"].shape[0])
        return torch.stack([samples if name == "sop_loss" else masked for name in self.term_names])

    def loss_terms(self, outputs: tuple[torch.Tensor, ...], batch: Batch, context: LayoutContext) -> list[LossTerm]:
        """The sum of the masked tokens' cross-entropies, and that of the samples'."""
        terms = word_terms(outputs, words_to_find(batch), batch, self.loss, context)
        if self.next_sentence:
            scores = outputs[-1].to(terms[0].sum.dtype)
            terms.append(
                LossTerm("sop_loss", 1.0, functional.cross_entropy(scores, batch["is_random"], reduction="sum"))
            )
        return terms
