"""Parameters and floating point operations of a model by formula. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megallm.config.resolve import attention_window, kv_channels
from megallm.config.tree import ModelConfig
from megallm.plan.parameters import known_vocab_size, layer_parameters, norm_elements


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model at the true size of its vocabulary, by where they stand."""

    embedding: int
    positions: int
    per_layer: int
    num_layers: int
    final_norm: int
    head: int  # 0 where the embedding serves as output layer too

    @property
    def layers(self) -> int:
        """Parameters of all layers."""
        return self.num_layers * self.per_layer

    @property
    def total(self) -> int:
        """Parameters of the whole model; a tied matrix counts once."""
        return self.embedding + self.positions + self.layers + self.final_norm + self.head


@dataclass(frozen=True)
class ModelFlops:
    """Floating point operations per token of one training step: matrix products, forward and backward.

    A product of [m, k] and [k, n] takes 2 m k n operations, its backward pass twice as many. The two conventions for
    the products of queries, keys and values are both in use: `half` counts what a causal mask leaves (half of the
    square, or with a window its band in that half), `full` counts the whole square. Recomputation, norms, activations,
    softmax and the lookup of the embedding count in neither; the output layer counts in both.
    """

    weights: int  # products with weights, output layer included
    attention_full: int  # scores and their product with values, over the whole square
    seen: float  # the share of the square that the mask leaves

    @property
    def half(self) -> float:
        """Operations per token with attention counted where the mask lets it look."""
        return self.weights + self.attention_full * self.seen

    @property
    def full(self) -> int:
        """Operations per token with attention counted over the whole square."""
        return self.weights + self.attention_full


def parameter_count(model: ModelConfig, sequence_length: int | None = None) -> ParameterCount:
    """Parameters of `model`, at the true size of its vocabulary (padding exists at run time only).

    `sequence_length` stands in for a `max_position_embeddings` that is not given. Raises ValueError where the
    vocabulary or a learned position table has no size.
    """
    vocabulary = known_vocab_size(model)
    positions = 0
    if model.position_embedding_type == "learned_absolute":
        length = model.max_position_embeddings or sequence_length
        if length is None:
            raise ValueError("The length of the position table is not known: give --max-position-embeddings.")
        positions = length * model.hidden_size
    return ParameterCount(
        embedding=vocabulary * model.hidden_size,
        positions=positions,
        per_layer=sum(tensor.elements for tensor in layer_parameters(model).values()),
        num_layers=model.num_layers,
        final_norm=norm_elements(model),
        head=0 if model.tie_embeddings else vocabulary * model.hidden_size,
    )


def flops_per_token(model: ModelConfig, sequence_length: int) -> ModelFlops:
    """Operations that one token of a training step takes, forward and backward; a step takes this times its tokens.

    Raises ValueError where the size of the vocabulary is not known.
    """
    # Scores and their product with the values: 4 x sequence x width forward, over the whole square.
    attention_forward = 4 * sequence_length * _query_width(model)
    return ModelFlops(
        weights=6 * model.num_layers * _layer_weights(model) + head_flops_per_token(model),
        attention_full=3 * model.num_layers * attention_forward,
        seen=_share_seen(model, sequence_length),
    )


def _share_seen(model: ModelConfig, sequence_length: int) -> float:
    """Share of the square of scores that a causal mask, with the window if there is one, leaves: without one half.

    A band of width w = share x length below the diagonal has length x w - w^2 / 2 places.
    """
    window = attention_window(model)
    share = 1.0 if window is None else min(1.0, (window + 1) / sequence_length)
    return share - share**2 / 2


def head_flops_per_token(model: ModelConfig) -> int:
    """The part of the output layer in `flops_per_token`."""
    return 6 * known_vocab_size(model) * model.hidden_size


def _layer_weights(model: ModelConfig) -> int:
    """Elements of the matrices of one layer."""
    return sum(tensor.elements for tensor in layer_parameters(model).values() if tensor.is_matrix)


def _query_width(model: ModelConfig) -> int:
    return model.num_attention_heads * kv_channels(model)
