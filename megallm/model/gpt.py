"""The decoder-only transformer, cut into pipeline stages."""

from __future__ import annotations

import torch
from torch import nn

from megallm.config.resolve import attention_window, loss_chunk_size
from megallm.config.tree import Config
from megallm.layers.cache import KeyValueCache
from megallm.layers.chunked_loss import chunked_cross_entropy
from megallm.layers.context import LayoutContext
from megallm.layers.embedding import loss_over
from megallm.layers.linear import column_parallel_linear
from megallm.layers.norm import Norm
from megallm.model.block import norm_settings
from megallm.model.embedding import Batch
from megallm.model.stage import TransformerStage
from megallm.model.word_loss import word_loss


class GPTHead(nn.Module):
    """Final norm and output layer.

    [sequence (/ tp), batch, hidden] -> a tuple of logits [sequence, batch, padded vocabulary / tp]. Where these are to
    be made in chunks of tokens and the micro-batch has labels, the losses of its tokens instead (see `TokenLosses`):
    [sequence, batch].
    """

    def __init__(self, config: Config, context: LayoutContext, weight: nn.Parameter) -> None:
        super().__init__()
        self.context = context
        self.norm = Norm("decoder.final_norm", norm_settings(config.model), config.model.hidden_size, context)
        self.weight = weight
        self.loss = loss_over(context.tp, word_loss(config), weight.shape[0])
        self.chunk_size = loss_chunk_size(config)

    def forward(self, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        hidden = self.norm(hidden)
        if self.chunk_size is None or "labels" not in batch:
            return (column_parallel_linear(hidden, self.weight, self.context),)
        labels = batch["labels"].t()  # [batch, sequence] -> [sequence, batch]
        return chunked_cross_entropy(hidden, self.weight, labels, self.loss, self.context, self.chunk_size).tensors()


class GPTStage(TransformerStage):
    """Consecutive layers of a GPT, with the embedding before the first and the head after the last.

    Of a micro-batch it also takes `document_ids` int64 [batch, sequence], if they are there: attention then stays
    within documents. The last stage returns logits, or losses (see `GPTHead`).

    Whoever writes a text sets `cache`: the tokens of a micro-batch then follow those that the cache holds.
    """

    def __init__(self, config: Config, layers: range, context: LayoutContext, *, is_first: bool, is_last: bool) -> None:
        super().__init__("decoder", config, layers, context, is_first=is_first, is_last=is_last)
        if is_last:
            self.head = GPTHead(config, context, self.output_weight())
        self.window = attention_window(config.model)

    def allowed_positions(self, batch: Batch) -> torch.Tensor | None:
        """Where attention may look: bool [batch or 1, 1, sequence, sequence], or None for all that came before.

        With a cache it is [batch, 1, sequence, all tokens so far].
        """
        tokens = batch["tokens"]
        length = tokens.shape[1]
        if self.cache is not None:
            return self._allowed_with_cache(self.cache, length)
        reach = length - 1 if self.window is None else self.window
        if "document_ids" in batch:
            documents = batch["document_ids"]
            allowed = (documents.unsqueeze(1) == documents.unsqueeze(2)).unsqueeze(1)  # [batch, 1, sequence, sequence]
        elif reach < length - 1:
            allowed = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device)
        else:
            return None
        return allowed.tril().triu(-reach)

    def _allowed_with_cache(self, cache: KeyValueCache, num_new: int) -> torch.Tensor:
        """bool [batch, 1, new, so far]: each new token looks at itself and at what came before it in its text."""
        end = cache.end_with(num_new)
        positions = cache.positions(num_new)
        distance = positions.unsqueeze(2) - torch.arange(end, device=positions.device)  # [batch, new, so far]
        reach = end if self.window is None else self.window
        return ((distance >= 0) & (distance <= reach)).unsqueeze(1)
