"""The terms of every task that finds words."""

from __future__ import annotations

import torch

from megallm.layers.context import LayoutContext
from megallm.layers.embedding import vocabulary_cross_entropy
from megallm.model.embedding import Batch
from megallm.ops.cross_entropy import CrossEntropy, TokenLosses
from megallm.train.loss import LossTerm


def word_term_names(loss: CrossEntropy) -> tuple[str, ...]:
    """Names of `word_terms`, all of which count tokens."""
    return ("lm_loss", "z_loss") if loss.z_loss else ("lm_loss",)


def word_terms(
    outputs: tuple[torch.Tensor, ...], labels: torch.Tensor, batch: Batch, loss: CrossEntropy, context: LayoutContext
) -> list[LossTerm]:
    """The sum of the cross-entropies of the tokens that the micro-batch's loss mask lets count.

    outputs: of the last stage: logits [sequence, batch, padded vocabulary / tp], or already `TokenLosses`; more may
        follow.
    labels: int64 [sequence, batch].
    loss: over the whole vocabulary.

    What training lowers has label smoothing and z-loss in it. What is told has not, so that runs with and without them
    can be compared; with a z-loss its squares are told as a term of their own.
    """
    if outputs[0].dim() == 3:  # logits
        losses = vocabulary_cross_entropy(outputs[0], labels, loss, context.tp, context.operators.of("cross_entropy"))
    else:
        losses = TokenLosses(*outputs[: 3 if loss.is_regularised else 1])
    counted = batch["loss_mask"].t()  # [batch, sequence] -> [sequence, batch]
    objective = (losses.objective * counted).sum()
    if losses.plain is None or losses.squares is None:
        return [LossTerm("lm_loss", 1.0, objective)]
    terms = [LossTerm("lm_loss", 1.0, (losses.plain * counted).sum(), objective)]
    if loss.z_loss:
        # Its gradient is in that of the other term.
        terms.append(LossTerm("z_loss", 0.0, (losses.squares * counted).sum()))
    return terms
