"""The encoder of BERT (Devlin et al., arXiv 1810.04805), cut into pipeline stages.

Its layers are those of every other model here. With --apply-residual-connection-post-layernorm they compute what the
original does, whose norms stand at the end of a layer: the norm of the embedding is the first of layer 0, the norm at
the end of a layer is the first of the next one, and the last one is the final norm.
"""

from __future__ import annotations

import torch
from torch import nn

from megallm.config.resolve import loss_chunk_size, num_token_types
from megallm.config.tree import Config, ModelConfig
from megallm.layers.chunked_loss import chunked_cross_entropy
from megallm.layers.context import LayoutContext
from megallm.layers.embedding import loss_over, vocabulary_bias
from megallm.layers.linear import ReplicatedLinear, column_parallel_linear
from megallm.layers.norm import Norm
from megallm.layers.regions import first_position, value_of_first_rank
from megallm.model.block import norm_settings
from megallm.model.embedding import Batch
from megallm.model.initial import initial_methods
from megallm.model.stage import TransformerStage
from megallm.model.word_loss import word_loss
from megallm.ops import gelu


class BERTHead(nn.Module):
    """Final norm; words at every position, and with the binary head whether the two texts are in another order.

    [sequence (/ tp), batch, hidden] -> logits [sequence, batch, padded vocabulary / tp], and [batch, 2]. Where logits
    are to be made in chunks of tokens and the micro-batch has labels, the losses of its tokens instead (see
    `TokenLosses`): [sequence, batch].
    """

    def __init__(self, config: Config, context: LayoutContext, weight: nn.Parameter, padded_size: int) -> None:
        super().__init__()
        model = config.model
        assert model.vocab_size, "the configuration is resolved"
        hidden, norm, initial = model.hidden_size, norm_settings(model), initial_methods(model).inner
        self.context = context
        self.norm = Norm("encoder.final_norm", norm, hidden, context)
        self.transform = ReplicatedLinear(
            "head.transform", hidden, hidden, context, initial, sees_parts=context.sequence_parallel
        )
        self.transform_norm = Norm("head.norm", norm, hidden, context)
        self.weight = weight
        self.bias = vocabulary_bias("output.bias", model.vocab_size, padded_size, context)
        self.next_sentence = NextSentence(model, context) if model.bert_binary_head else None
        self.loss = loss_over(context.tp, word_loss(config), weight.shape[0])
        self.chunk_size = loss_chunk_size(config)

    def forward(self, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        hidden = self.norm(hidden)
        activated = gelu(self.transform(hidden), implementation=self.context.operators.of("gelu"))
        if not self.context.sequence_parallel:
            # The copies of the norm's weights that the ranks update would drift apart with what a product rounds.
            activated = value_of_first_rank(activated, self.context.tp)
        transformed = self.transform_norm(activated)
        words = self._words(transformed, batch)
        return words if self.next_sentence is None else (*words, self.next_sentence(hidden))

    def _words(self, transformed: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Logits or losses."""
        if self.chunk_size is None or "labels" not in batch:
            return (column_parallel_linear(transformed, self.weight, self.context) + self.bias,)
        labels = words_to_find(batch)
        return chunked_cross_entropy(
            transformed, self.weight, labels, self.loss, self.context, self.chunk_size, self.bias
        ).tensors()


def words_to_find(batch: Batch) -> torch.Tensor:
    """The labels, any word where none is to be found (labelled -1): [batch, sequence] -> [sequence, batch]."""
    return batch["labels"].t().clamp(min=0)


class NextSentence(nn.Module):
    """From what stands at the first token: [sequence (/ tp), batch, hidden] -> [batch, 2], on every tensor rank."""

    def __init__(self, model: ModelConfig, context: LayoutContext) -> None:
        super().__init__()
        self.context = context
        initial = initial_methods(model).inner
        hidden = model.hidden_size
        self.pooler = ReplicatedLinear("pooler", hidden, hidden, context, initial, sees_parts=False)
        self.output = ReplicatedLinear("next_sentence", hidden, 2, context, initial, sees_parts=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first = first_position(hidden, self.context.tp, self.context.sequence_parallel)
        return self.output(torch.tanh(self.pooler(first)))


class BERTStage(TransformerStage):
    """Consecutive layers of a BERT, with the embedding before the first and the heads after the last.

    Of a micro-batch it also takes `padding_mask` int64 [batch, sequence], 0 where attention must not look, and where
    there are types of tokens `types` int64 [batch, sequence], 0 in the first text and 1 in the second.
    """

    def __init__(self, config: Config, layers: range, context: LayoutContext, *, is_first: bool, is_last: bool) -> None:
        num_types = num_token_types(config.model)
        super().__init__("encoder", config, layers, context, is_first=is_first, is_last=is_last, num_types=num_types)
        if is_last:
            self.head = BERTHead(config, context, self.output_weight(), self.padded_size)

    def allowed_positions(self, batch: Batch) -> torch.Tensor:
        """All that is no padding, before and after: bool [batch, 1, sequence, sequence]."""
        tokens = batch["padding_mask"].bool()
        # [batch, sequence of keys] -> [batch, 1, sequence of queries, sequence of keys]
        return tokens[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
