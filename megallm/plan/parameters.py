"""The parameters of a model by formula: of a layer, of a stage, and what one process holds of them. Needs no torch.

`layer_parameters` is the one table of what a layer consists of; parameter counts, operations, memory and messages all
come from it. A new parameter of a layer gets its line there, and a test compares with the model that is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallm.config.resolve import GATED_ACTIVATIONS, ffn_hidden_size, kv_channels, num_query_groups, num_token_types
from megallm.config.tree import Config, ModelConfig


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: its elements over all tensor ranks, and whether each of those holds a part or the whole.

    What `is_matrix` takes part in a product with every token; biases and norms do not. Of what `is_partial` every
    tensor rank computes a part of the gradient, also where sequences are not cut: from its own heads, or none.
    """

    elements: int
    is_cut: bool
    is_matrix: bool = False
    is_partial: bool = False

    def on_a_rank(self, tensor_size: int) -> int:
        """Elements that one tensor rank holds."""
        return self.elements // tensor_size if self.is_cut else self.elements


@dataclass(frozen=True)
class HeldParameters:
    """Elements of the parameters that one process holds, by the ranks over which their gradients are reduced."""

    over_data: int
    over_tensor_and_data: int  # whole on every tensor rank, each of which sees a part of the sequence

    @property
    def total(self) -> int:
        return self.over_data + self.over_tensor_and_data

    def __add__(self, other: HeldParameters) -> HeldParameters:
        return HeldParameters(self.over_data + other.over_data, self.over_tensor_and_data + other.over_tensor_and_data)


def layer_parameters(model: ModelConfig) -> dict[str, Tensor]:
    """The stored tensors of one layer, by name."""
    hidden, ffn = model.hidden_size, ffn_hidden_size(model)
    query = model.num_attention_heads * kv_channels(model)
    packed = query + 2 * num_query_groups(model) * kv_channels(model)
    up = ffn * (2 if model.activation in GATED_ACTIVATIONS else 1)
    tensors = {
        "attention.norm": Tensor(norm_elements(model), is_cut=False),
        "attention.query_key_value": Tensor(packed * hidden, is_cut=True, is_matrix=True),
        "attention.output": Tensor(query * hidden, is_cut=True, is_matrix=True),
        "mlp.norm": Tensor(norm_elements(model), is_cut=False),
        "mlp.up": Tensor(up * hidden, is_cut=True, is_matrix=True),
        "mlp.down": Tensor(ffn * hidden, is_cut=True, is_matrix=True),
    }
    if model.qk_layernorm:
        both = 2 * norm_elements(model, kv_channels(model))
        tensors["attention.query_and_key_norm"] = Tensor(both, is_cut=False, is_partial=True)
    if model.add_bias_linear or model.add_qkv_bias:
        tensors["attention.query_key_value.bias"] = Tensor(packed, is_cut=True)
    if model.add_bias_linear:
        tensors["attention.output.bias"] = Tensor(hidden, is_cut=False)
        tensors["mlp.up.bias"] = Tensor(up, is_cut=True)
        tensors["mlp.down.bias"] = Tensor(hidden, is_cut=False)
    return tensors


def embedding_parameters(model: ModelConfig) -> dict[str, Tensor]:
    """The stored tensors before the first layer, by name, but for the embedding of words. `model` is resolved."""
    tensors = {}
    if model.position_embedding_type == "learned_absolute":
        assert model.max_position_embeddings, "the configuration is resolved"
        tensors["position"] = Tensor(model.max_position_embeddings * model.hidden_size, is_cut=False)
    if num_token_types(model):
        tensors["type"] = Tensor(num_token_types(model) * model.hidden_size, is_cut=False)
    return tensors


def head_parameters(model: ModelConfig, vocabulary: int) -> dict[str, Tensor]:
    """The stored tensors after the last layer, by name, but for the matrix of the output layer of `vocabulary` rows."""
    hidden = model.hidden_size
    tensors = {"final_norm": Tensor(norm_elements(model), is_cut=False)}
    if model.architecture == "bert":
        tensors |= {
            "transform": Tensor(hidden**2, is_cut=False, is_matrix=True, is_partial=True),
            "transform.bias": Tensor(hidden, is_cut=False, is_partial=True),
            "norm": Tensor(norm_elements(model), is_cut=False),
            "output.bias": Tensor(vocabulary, is_cut=True),
        }
        if model.bert_binary_head:
            tensors |= {
                "pooler": Tensor(hidden**2 + hidden, is_cut=False, is_partial=True),
                "next_sentence": Tensor(2 * hidden + 2, is_cut=False, is_partial=True),
            }
    return tensors


def norm_elements(model: ModelConfig, width: int | None = None) -> int:
    """Elements of a norm of `width`, by default that of the residual stream: weight, and bias where it has one."""
    return (width or model.hidden_size) * (2 if model.normalization == "LayerNorm" else 1)


def padded_vocabulary(config: Config) -> int:
    """Rows of the embedding in storage: the next multiple of the padding times the tensor parallel size.

    Raises ValueError where the size of the vocabulary is not known.
    """
    unit = config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    return -(-known_vocab_size(config.model) // unit) * unit


def known_vocab_size(model: ModelConfig) -> int:
    """The size of the vocabulary. Raises ValueError where it is not known."""
    if model.vocab_size is None:
        raise ValueError("The size of the vocabulary is not known: give --vocab-size, or a tokenizer that tells it.")
    return model.vocab_size


def held_by_stage(config: Config, num_layers: int, *, is_first: bool, is_last: bool) -> HeldParameters:
    """What one process holds of a stage of `num_layers` layers, padding of the vocabulary included.

    `config` is resolved. Where embedding and output layer are tied, the first and the last stage both hold them, unless
    they are one stage.
    """
    model, tensor_size = config.model, config.parallel.tensor_model_parallel_size
    held = [(tensor, num_layers) for tensor in layer_parameters(model).values()]
    vocabulary = Tensor(padded_vocabulary(config) * model.hidden_size, is_cut=True)
    if is_first:
        held += [(tensor, 1) for tensor in (vocabulary, *embedding_parameters(model).values())]
    if is_last:
        held += [(tensor, 1) for tensor in head_parameters(model, padded_vocabulary(config)).values()]
        if not (is_first and model.tie_embeddings):
            held.append((vocabulary, 1))
    partial = config.parallel.sequence_parallel and tensor_size > 1
    over_both = sum(
        times * tensor.elements for tensor, times in held if tensor.is_partial or (partial and not tensor.is_cut)
    )
    return HeldParameters(sum(times * tensor.on_a_rank(tensor_size) for tensor, times in held) - over_both, over_both)
