"""What the pipeline stages of all transformers share: an embedding before the first layers, a head after the last."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from megallm.config.tree import Config
from megallm.layers.cache import KeyValueCache
from megallm.layers.context import LayoutContext, SequenceContext
from megallm.layers.embedding import padded_vocab_size, vocabulary_parameter
from megallm.model.embedding import WORD_EMBEDDING, Batch, Embedding
from megallm.model.initial import initial_methods
from megallm.model.positions import rotary_positions
from megallm.model.stack import LayerStack
from megallm.parameter import initialize


class TransformerStage(nn.Module):
    """Consecutive layers of a transformer, named `name`.layers, with the embedding before the first.

    Takes the previous stage's outputs and a micro-batch (`tokens`, `position_ids` int64 [batch, sequence],
    `sample_ids` int64 [batch], and what the kind of model asks for), returns a tuple: hidden states [sequence (/ tp),
    batch, hidden], or what `head`, to be set on the last stage, makes of them and the micro-batch.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        layers: range,
        context: LayoutContext,
        *,
        is_first: bool,
        is_last: bool,
        num_types: int = 0,
    ) -> None:
        super().__init__()
        model = config.model
        assert model.vocab_size, "the configuration is resolved"
        self.config = config
        self.context = context
        self.padded_size = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, context.tp.size)
        tie = WORD_EMBEDDING if model.tie_embeddings and not is_last else None
        self.embedding = Embedding(config, context, self.padded_size, tie, num_types) if is_first else None
        self.layers = LayerStack(f"{name}.layers", layers, model, config.training, context)
        self.head: nn.Module | None = None
        self.cache: KeyValueCache | None = None
        self.rotary = rotary_positions(model, context)

    def output_weight(self) -> nn.Parameter:
        """The output layer's matrix, or the word embedding where it is tied and on this stage too."""
        model = self.config.model
        assert model.vocab_size, "the configuration is resolved"
        tied, methods = model.tie_embeddings, initial_methods(model)
        if tied and self.embedding is not None:
            return self.embedding.word
        # With tied weights on another pipeline rank, this is a second holder of the embedding, equal from the first
        # step on.
        return vocabulary_parameter(
            WORD_EMBEDDING if tied else "output.weight",
            model.vocab_size,
            self.padded_size,
            model.hidden_size,
            self.context,
            methods.embedding if tied else methods.inner,
            tie=WORD_EMBEDDING if tied else None,
            counts=not tied,
        )

    def forward(
        self, inputs: tuple[torch.Tensor, ...], batch: Batch, step: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """`step`, an int64 scalar, keys dropout; None switches it off."""
        sequence = self.describe_sequence(batch, step)
        hidden = inputs[0] if self.embedding is None else self.embedding(batch, sequence)
        hidden = self.layers(hidden, sequence)
        return (hidden,) if self.head is None else self.head(hidden, batch)

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

    @abstractmethod
    def allowed_positions(self, batch: Batch) -> torch.Tensor | None:
        """Where attention may look: bool that broadcasts to [batch, 1, sequence, sequence], or None for all that came
        before.
        """

    def initialize(self) -> None:
        """Fills every parameter with its initial values, the same in every layout."""
        for parameter in dict.fromkeys(self.parameters()):
            initialize(parameter, self.context.seed, self.context.operators.of("initial_values"))
