"""Which parameter of a model starts how."""

from __future__ import annotations

import math
from typing import Any

import torch

from megallm.communication import Group, Transport
from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.layers.context import LayoutContext
from megallm.model.gpt import GPTStage
from megallm.parameter import Initial, description_of

SETTINGS = {
    "model.num_layers": 2,
    "model.hidden_size": 16,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 24,
    "model.activation": "swiglu",
    "model.vocab_size": 50,
    "model.tie_embeddings": False,
    "data.seq_length": 8,
    "training.micro_batch_size": 1,
}


def initial_values(**changes: Any) -> dict[str, Initial]:
    """How the pieces of the embeddings, of one layer and of the output layer start."""
    config = resolve(build(SETTINGS | {f"model.{name}": value for name, value in changes.items()}), 1)
    context = LayoutContext(Group((0,), 0, Transport(None)), False, torch.float32, torch.device("cpu"), seed=1)
    stage = GPTStage(config, range(2), context, is_first=True, is_last=True)
    descriptions = [description_of(parameter) for parameter in stage.parameters()]
    return {piece.name: description.initial for description in descriptions for piece in description.pieces}


def test_matrices_are_normal_and_those_into_the_residual_stream_smaller() -> None:
    initial = initial_values(init_method_std=0.02)
    inner, output = Initial("normal", 0.02), Initial("normal", 0.02 / math.sqrt(2 * 2))
    for name in ("attention.query", "attention.value", "mlp.gate", "mlp.up"):
        assert initial[f"decoder.layers.1.{name}.weight"] == inner
    assert initial["decoder.layers.1.attention.output.weight"] == output
    assert initial["decoder.layers.0.mlp.down.weight"] == output
    for name in ("embedding.word.weight", "embedding.position.weight", "output.weight"):
        assert initial[name] == inner
    assert initial["decoder.layers.1.attention_norm.weight"] == Initial("constant", 1.0)
    assert initial["decoder.layers.1.mlp.gate.bias"] == Initial("constant", 0.0)


def test_xavier_counts_the_rows_and_columns_of_what_is_stored_as_one_matrix() -> None:
    initial = initial_values(init_method_xavier_uniform=True, group_query_attention=True, num_query_groups=2)

    def bound(rows: int, columns: int) -> Initial:
        return Initial("uniform", math.sqrt(6 / (rows + columns)))

    assert initial["decoder.layers.0.attention.key.weight"] == bound(16 + 8 + 8, 16)
    assert initial["decoder.layers.0.mlp.up.weight"] == bound(24 + 24, 16)
    assert initial["decoder.layers.0.mlp.down.weight"] == bound(16, 24)
    assert initial["output.weight"] == initial["embedding.word.weight"] == bound(50, 16)
    assert initial["embedding.position.weight"] == bound(8, 16)


def test_embeddings_may_have_a_deviation_of_their_own() -> None:
    for others in ({}, {"init_method_xavier_uniform": True}):
        initial = initial_values(embedding_init_method_std=0.7, **others)
        assert initial["embedding.word.weight"] == initial["embedding.position.weight"] == Initial("normal", 0.7)
        assert initial["output.weight"] != Initial("normal", 0.7)
    assert initial_values(embedding_init_method_std=0.7, tie_embeddings=True)["embedding.word.weight"].size == 0.7
