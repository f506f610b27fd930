"""The tree as dictionaries and YAML and back, its differences, and its derived values."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml

from megallm.config import Config, data_parallel_size, difference, from_dict, resolve, to_dict, to_yaml
from megallm.config.dictionary import build, read_yaml

RUN = build(
    {
        "model.num_layers": 4,
        "model.hidden_size": 192,
        "model.num_attention_heads": 6,
        "model.activation": "swiglu",
        "parallel.tensor_model_parallel_size": 2,
        "training.micro_batch_size": 2,
        "training.train_iters": 50,
        "optimizer.lr": 1e-3,
        "data.seq_length": 128,
        "data.data_path": ["0.5", "a", "0.5", "b"],
    }
)


def test_round_trip_through_dictionary_json_and_yaml() -> None:
    for config in (Config(), RUN, resolve(RUN, 8, 1000)):
        assert from_dict(to_dict(config)) == config
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
        assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_missing_names_take_their_defaults() -> None:
    assert from_dict({"model": {"num_layers": 2}}) == build({"model.num_layers": 2})
    assert from_dict({}) == Config()


def test_a_file_that_holds_itself_is_told(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: &model {num_layers: *model}\n")
    assert read_yaml(str(file)) == ({}, [f"--config {file} holds itself, or lists within lists without end"])


def test_numbers_as_yaml_writes_them() -> None:
    config = from_dict(yaml.safe_load("optimizer: {lr: 1e-4, clip_grad: 1}\ndata: {data_path: [0.3, a, 0.7, b]}"))
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (1e-4, 1.0)
    assert isinstance(config.optimizer.clip_grad, float)
    assert config.data.data_path == ["0.3", "a", "0.7", "b"]


def test_strictness_lists_every_problem() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)1\. model\.num_layer is unknown; did you mean num_layers.*2\. .*lr takes"
    ):
        from_dict({"model": {"num_layer": 2}, "optimizer": {"lr": True}})
    with pytest.raises(ValueError, match="mapping of model, parallel"):
        from_dict([1])


def test_difference_lists_changed_fields_in_order() -> None:
    other = replace(RUN, optimizer=replace(RUN.optimizer, lr=0.1), model=replace(RUN.model, activation="gelu"))
    assert difference(RUN, RUN) == []
    assert difference(RUN, other) == [("model.activation", "swiglu", "gelu"), ("optimizer.lr", 1e-3, 0.1)]


def test_the_tree_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        RUN.model.num_layers = 3  # type: ignore[misc]


def test_resolve_fills_every_derived_default() -> None:
    resolved = resolve(RUN, 8, tokenizer_vocab_size=1000)
    assert {path: new for path, _, new in difference(RUN, resolved)} == {
        "model.ffn_hidden_size": 512,
        "model.num_query_groups": 6,
        "model.kv_channels": 32,
        "model.max_position_embeddings": 128,
        "model.vocab_size": 1000,
        "parallel.pipeline_schedule": "1f1b",
        "parallel.ddp_bucket_size": 40_000_000,
        "training.global_batch_size": 8,
        "optimizer.lr_decay_iters": 50,
    }
    assert resolve(resolved, 8, 1000) == resolved
    assert resolve(resolved, 16, 1000) == resolved


def test_resolve_keeps_what_is_given() -> None:
    given = {
        "model.ffn_hidden_size": 100,
        "model.num_query_groups": 3,
        "model.kv_channels": 10,
        "model.max_position_embeddings": 999,
        "model.vocab_size": 1024,
        "parallel.pipeline_schedule": "gpipe",
        "parallel.ddp_bucket_size": 5,
        "training.global_batch_size": 16,
        "optimizer.lr_decay_iters": 7,
    }
    config = build({**{path: new for path, _, new in difference(Config(), RUN)}, **given})
    assert resolve(config, 8, 1000) == config


def test_defaults_by_kind() -> None:
    plain = replace(RUN, model=replace(RUN.model, activation="gelu"))
    assert resolve(plain, 2).model.ffn_hidden_size == 768
    assert resolve(plain, 2).model.vocab_size is None
    assert resolve(plain, 200).parallel.ddp_bucket_size == 100_000_000
    # Llama-2-13B's hidden size, whose 8/3 is not whole.
    wide = replace(RUN, model=replace(RUN.model, hidden_size=5120, num_attention_heads=40))
    assert resolve(wide, 2).model.ffn_hidden_size == int(5120 * 4 * 2 / 3 / 64) * 64
    virtual = replace(RUN, parallel=replace(RUN.parallel, num_virtual_stages_per_pipeline_rank=2))
    assert resolve(virtual, 2).parallel.pipeline_schedule == "interleaved"


def test_what_cannot_be_derived_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"3 processes cannot be laid out.*start a multiple of 2"):
        resolve(RUN, 3)
    with pytest.raises(ValueError, match="--vocab-size 10 is smaller than the tokenizer's 1000"):
        resolve(replace(RUN, model=replace(RUN.model, vocab_size=10)), 2, 1000)
    with pytest.raises(ValueError, match="--kv-channels"):
        resolve(replace(RUN, model=replace(RUN.model, num_attention_heads=7)), 2)
    assert data_parallel_size(RUN.parallel, 8) == 4
