"""The decoder-only transformer, cut into pipeline stages."""

from __future__ import annotations

import torch
from torch import nn

from megallm.config.resolve import attention_window
from megallm.config.tree import Config
from megallm.layers.cache import KeyValueCache
from megallm.layers.context import LayoutContext, SequenceContext
from megallm.layers.dropout import HiddenDropout
from megallm.layers.embedding import embed_tokens, padded_vocab_size, vocabulary_parameter
from megallm.layers.linear import column_parallel_linear
from megallm.layers.norm import Norm
from megallm.layers.positions import sinusoidal_table
from megallm.model.block import norm_settings
from megallm.model.initial import initial_methods
from megallm.model.positions import rotary_positions
from megallm.model.stack import LayerStack
from megallm.parameter import Description, initialize, make_parameter, whole

Batch = dict[str, torch.Tensor]

WORD_EMBEDDING = "embedding.word.weight"


class GPTEmbedding(nn.Module):
    """Words and positions: tokens int64 [batch, sequence] -> [sequence (/ tp), batch, hidden]."""

    sinusoids: torch.Tensor | None

    def __init__(self, config: Config, context: LayoutContext, padded_size: int, tie: str | None) -> None:
        super().__init__()
        model = config.model
        assert model.vocab_size and model.max_position_embeddings, "the configuration is resolved"
        self.context = context
        methods = initial_methods(model)
        self.word = vocabulary_parameter(
            WORD_EMBEDDING, model.vocab_size, padded_size, model.hidden_size, context, methods.embedding, tie=tie
        )
        # Rounded once, as the models were trained that scale their embeddings.
        self.scale = float(torch.tensor(model.hidden_size**0.5, dtype=context.dtype)) if model.scale_embeddings else 1.0
        self.position = None
        sinusoids = None
        if model.position_embedding_type == "learned_absolute":
            description = Description(
                (whole("embedding.position.weight", (model.max_position_embeddings, model.hidden_size)),),
                methods.embedding((model.max_position_embeddings, model.hidden_size)),
                replicated_over=("tp",),
                gradient_partial_over=context.partial_axes,
            )
            self.position = make_parameter(description, context.dtype, context.device)
        elif model.position_embedding_type == "sinusoidal":
            sinusoids = sinusoidal_table(
                model.max_position_embeddings, model.hidden_size, context.dtype, context.device
            )
        self.register_buffer("sinusoids", sinusoids, persistent=False)
        self.dropout = HiddenDropout("embedding", model.hidden_dropout, context)

    def forward(self, batch: Batch, sequence: SequenceContext) -> torch.Tensor:
        hidden = embed_tokens(batch["tokens"], self.word, self.context)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        table = self.sinusoids if self.position is None else self.position
        if table is not None:
            # [batch, sequence] -> the tokens of this rank, [local sequence, batch]
            positions = batch["position_ids"].t()[sequence.local_positions]
            hidden = hidden + nn.functional.embedding(positions, table)
        return self.dropout(hidden, sequence)


class GPTHead(nn.Module):
    """Final norm and output layer.

    [sequence (/ tp), batch, hidden] -> logits [sequence, batch, padded vocabulary / tp].
    """

    def __init__(self, config: Config, context: LayoutContext, padded_size: int, shared: nn.Parameter | None) -> None:
        super().__init__()
        model = config.model
        assert model.vocab_size, "the configuration is resolved"
        self.context = context
        self.norm = Norm("decoder.final_norm", norm_settings(model), model.hidden_size, context)
        if shared is not None:
            self.weight = shared
            return
        # With tied weights on another pipeline rank, this is a second holder of the embedding, equal from the first
        # step on.
        tied, methods = model.tie_embeddings, initial_methods(model)
        self.weight = vocabulary_parameter(
            WORD_EMBEDDING if tied else "output.weight",
            model.vocab_size,
            padded_size,
            model.hidden_size,
            context,
            methods.embedding if tied else methods.inner,
            tie=WORD_EMBEDDING if tied else None,
            counts=not tied,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return column_parallel_linear(self.norm(hidden), self.weight, self.context)


class GPTStage(nn.Module):
    """Consecutive layers of a GPT, with the embedding before the first and the head after the last.

    Takes the previous stage's outputs and a micro-batch (`tokens`, `position_ids` int64 [batch, sequence],
    `sample_ids` int64 [batch], optionally `document_ids` int64 [batch, sequence]), returns a tuple of one tensor:
    hidden states, or logits from the last stage.

    Whoever writes a text sets `cache`: the tokens of a micro-batch then follow those that the cache holds.
    """

    def __init__(self, config: Config, layers: range, context: LayoutContext, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        model, training = config.model, config.training
        assert model.vocab_size, "the configuration is resolved"
        self.config = config
        self.context = context
        padded = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, context.tp.size)
        tie = WORD_EMBEDDING if model.tie_embeddings and not is_last else None
        self.embedding = GPTEmbedding(config, context, padded, tie) if is_first else None
        self.layers = LayerStack("decoder.layers", layers, model, training, context)
        self.head = None
        if is_last:
            shared = self.embedding.word if self.embedding is not None and model.tie_embeddings else None
            self.head = GPTHead(config, context, padded, shared)
        self.cache: KeyValueCache | None = None
        self.rotary = rotary_positions(model, context)
        self.window = attention_window(model)

    def forward(
        self, inputs: tuple[torch.Tensor, ...], batch: Batch, step: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """`step`, an int64 scalar, keys dropout; None switches it off."""
        sequence = self.describe_sequence(batch, step)
        hidden = inputs[0] if self.embedding is None else self.embedding(batch, sequence)
        hidden = self.layers(hidden, sequence)
        if self.cache is not None:
            self.cache.advance(sequence.sequence_length)
        return (hidden,) if self.head is None else (self.head(hidden),)

    def describe_sequence(self, batch: Batch, step: torch.Tensor | None) -> SequenceContext:
        """What the layers may ask about this micro-batch."""
        context = self.context
        tokens = batch["tokens"]
        length = tokens.shape[1]
        local = length // context.tp.size if context.sequence_parallel else length
        start = context.tp.rank * local if context.sequence_parallel else 0
        rotation = None
        if self.rotary is not None:
            given = self.config.data.reset_position_ids or self.cache is not None
            rotation = self.rotary(length, batch["position_ids"] if given else None)
        return SequenceContext(
            sample_ids=batch["sample_ids"],
            sequence_length=length,
            local_positions=torch.arange(start, start + local, device=tokens.device),
            rotation=rotation,
            allowed=self.allowed_positions(batch),
            step=step,
            cache=self.cache,
        )

    def allowed_positions(self, batch: Batch) -> torch.Tensor | None:
        """Where attention may look: bool [batch or 1, 1, sequence, sequence], or None for all that came before.

        With a cache the last dim is that of all tokens so far.
        """
        tokens = batch["tokens"]
        length = tokens.shape[1]
        if self.cache is not None:
            return self._allowed_with_cache(self.cache.length, length, tokens.device)
        reach = length - 1 if self.window is None else self.window
        if "document_ids" in batch:
            documents = batch["document_ids"]
            allowed = (documents.unsqueeze(1) == documents.unsqueeze(2)).unsqueeze(1)  # [batch, 1, sequence, sequence]
        elif reach < length - 1:
            allowed = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device)
        else:
            return None
        return allowed.tril().triu(-reach)

    def _allowed_with_cache(self, before: int, new: int, device: torch.device) -> torch.Tensor:
        """bool [1, 1, new, before + new]: each new token looks at itself and at what came before it."""
        distance = torch.arange(new, device=device).unsqueeze(1) + before - torch.arange(before + new, device=device)
        reach = before + new if self.window is None else self.window
        return ((distance >= 0) & (distance <= reach)).view(1, 1, new, before + new)

    def initialize(self) -> None:
        """Fills every parameter with its initial values, the same in every layout."""
        for parameter in dict.fromkeys(self.parameters()):
            initialize(parameter, self.context.seed, self.context.operators.of("initial_values"))
