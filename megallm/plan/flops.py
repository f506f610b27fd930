"""Parameters and floating point operations of a model by formula. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megallm.config.resolve import attention_window, kv_channels
from megallm.config.tree import ModelConfig
from megallm.plan.parameters import Tensor, embedding_parameters, head_parameters, known_vocab_size, layer_parameters


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model at the true size of its vocabulary, by where they stand."""

    embedding: int
    positions: int
    types: int  # of tokens, in a BERT
    per_layer: int
    num_layers: int
    final_norm: int
    head: int  # of a decoder 0 where the embedding serves as output layer too

    @property
    def layers(self) -> int:
        """Parameters of all layers."""
        return self.num_layers * self.per_layer

    @property
    def total(self) -> int:
        """Parameters of the whole model; a tied matrix counts once."""
        return self.embedding + self.positions + self.types + self.layers + self.final_norm + self.head


@dataclass(frozen=True)
class ModelFlops:
    """Floating point operations per token of one training step: matrix products, forward and backward.

    A product of [m, k] and [k, n] takes 2 m k n operations, its backward pass twice as many. The two conventions for
    the products of queries, keys and values are both in use: `half` counts what a causal mask leaves (half of the
    square, or with a window its band in that half), `full` counts the whole square. For an encoder they are the same.
    Recomputation, norms, activations, softmax and the lookup of the embedding count in neither; the output layer counts
    in both.
    """

    weights: float  # products with weights, output layer included
    attention_full: int  # scores and their product with values, over the whole square
    seen: float  # the share of the square that the mask leaves

    @property
    def half(self) -> float:
        """Operations per token with attention counted where the mask lets it look."""
        return self.weights + self.attention_full * self.seen

    @property
    def full(self) -> float:
        """Operations per token with attention counted over the whole square."""
        return self.weights + self.attention_full


def parameter_count(model: ModelConfig, sequence_length: int | None = None) -> ParameterCount:
    """Parameters of `model`, at the true size of its vocabulary (padding exists at run time only).

    `sequence_length` stands in for a `max_position_embeddings` that is not given. Raises ValueError where the
    vocabulary or a learned position table has no size.
    """
    vocabulary = known_vocab_size(model)
    length = model.max_position_embeddings or sequence_length
    if model.position_embedding_type == "learned_absolute" and length is None:
        raise ValueError("The length of the position table is not known: give --max-position-embeddings.")
    tables = embedding_parameters(replace(model, max_position_embeddings=length))
    after = head_parameters(model, vocabulary)
    return ParameterCount(
        embedding=vocabulary * model.hidden_size,
        positions=_elements(tables, "position"),
        types=_elements(tables, "type"),
        per_layer=_elements(layer_parameters(model)),
        num_layers=model.num_layers,
        final_norm=_elements(after, "final_norm"),
        head=_elements(after)
        - _elements(after, "final_norm")
        + (0 if model.tie_embeddings else vocabulary * model.hidden_size),
    )


def _elements(tensors: Mapping[str, Tensor], name: str | None = None) -> int:
    """Elements of all tensors, or of one that may be missing."""
    return sum(tensor.elements for key, tensor in tensors.items() if name in (None, key))


def flops_per_token(model: ModelConfig, sequence_length: int) -> ModelFlops:
    """Operations that one token of a training step takes, forward and backward; a step takes this times its tokens.

    Raises ValueError where the size of the vocabulary is not known.
    """
    # Scores and their product with the values: 4 x sequence x width forward, over the whole square.
    attention_forward = 4 * sequence_length * _query_width(model)
    return ModelFlops(
        weights=6 * model.num_layers * _layer_weights(model) + head_flops_per_token(model, sequence_length),
        attention_full=3 * model.num_layers * attention_forward,
        seen=_share_seen(model, sequence_length),
    )


def _share_seen(model: ModelConfig, sequence_length: int) -> float:
    """Share of the square of scores that a causal mask, with the window if there is one, leaves: without one half.

    An encoder sees all of it. A band of width w = share x length below the diagonal has length x w - w^2 / 2 places.
    """
    if model.architecture == "bert":
        return 1.0
    window = attention_window(model)
    share = 1.0 if window is None else min(1.0, (window + 1) / sequence_length)
    return share - share**2 / 2


def head_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """The part of what follows the layers in `flops_per_token`: the output layer, and BERT's own products before it.

    Of a sample only the first token goes through BERT's head for two texts.
    """
    hidden, vocabulary = model.hidden_size, known_vocab_size(model)
    every_token = sum(tensor.elements for tensor in head_parameters(model, vocabulary).values() if tensor.is_matrix)
    flops = 6 * (vocabulary * hidden + every_token)
    if model.architecture == "bert" and model.bert_binary_head:
        return flops + 6 * (hidden * hidden + 2 * hidden) / sequence_length
    return flops


def _layer_weights(model: ModelConfig) -> int:
    """Elements of the matrices of one layer."""
    return sum(tensor.elements for tensor in layer_parameters(model).values() if tensor.is_matrix)


def _query_width(model: ModelConfig) -> int:
    return model.num_attention_heads * kv_channels(model)
