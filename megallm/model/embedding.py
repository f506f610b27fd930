"""What a token is before the first layer: its word, its place and its type."""

from __future__ import annotations

import torch
from torch import nn

from megallm.config.tree import Config
from megallm.layers.context import LayoutContext, SequenceContext
from megallm.layers.dropout import HiddenDropout
from megallm.layers.embedding import add_positions, embed_tokens, vocabulary_parameter
from megallm.layers.positions import sinusoidal_table
from megallm.model.initial import initial_methods
from megallm.parameter import Description, make_parameter, whole

Batch = dict[str, torch.Tensor]

WORD_EMBEDDING = "embedding.word.weight"


class Embedding(nn.Module):
    """Words, positions and, of `num_types`, token types: [batch, sequence] -> [sequence (/ tp), batch, hidden].

    Of a micro-batch it takes `tokens`, for types `types`, and `position_ids` where positions enter here, each int64
    [batch, sequence]. It is tied to the output layer on another pipeline rank where `tie` is its name.
    """

    sinusoids: torch.Tensor | None

    def __init__(
        self, config: Config, context: LayoutContext, padded_size: int, tie: str | None, num_types: int = 0
    ) -> None:
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

        def table(name: str, rows: int) -> nn.Parameter:
            shape = (rows, model.hidden_size)
            description = Description(
                (whole(name, shape),),
                methods.embedding(shape),
                replicated_over=("tp",),
                gradient_partial_over=context.partial_axes,
            )
            return make_parameter(description, context.dtype, context.device)

        self.position = None
        sinusoids = None
        if model.position_embedding_type == "learned_absolute":
            self.position = table("embedding.position.weight", model.max_position_embeddings)
        elif model.position_embedding_type == "sinusoidal":
            sinusoids = sinusoidal_table(
                model.max_position_embeddings, model.hidden_size, context.dtype, context.device
            )
        self.register_buffer("sinusoids", sinusoids, persistent=False)
        self.types = table("embedding.type.weight", num_types) if num_types else None
        self.dropout = HiddenDropout("embedding", model.hidden_dropout, context)

    def forward(self, batch: Batch, sequence: SequenceContext) -> torch.Tensor:
        hidden = embed_tokens(batch["tokens"], self.word, self.context)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        table = self.sinusoids if self.position is None else self.position
        if table is not None:
            hidden = add_positions(hidden, table, _own(batch["position_ids"], sequence), self.context)
        if self.types is not None:
            hidden = add_positions(hidden, self.types, _own(batch["types"], sequence), self.context)
        return self.dropout(hidden, sequence)


def _own(numbers: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
    """Of the tokens of this rank: int64 [batch, sequence] -> [local sequence, batch]."""
    return numbers.t()[sequence.local_positions]
