"""Every family against the transformers library: settings, every tensor's bits, logits, both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.config.tree import Config, ModelConfig, ParallelConfig
from megallm.convert.command import Output, Place, check, convert
from megallm.convert.compare import compare
from megallm.convert.huggingface import choose_family, open_folder, write_folder
from megallm.convert.model import config_of
from megallm.convert.native import open_native, write_native
from megallm.convert.verify import judge, our_logits, their_logits
from tests.distributed.transformers_weights import MODELS, VOCAB_SIZE, build_model

pytest.importorskip("transformers")
TOKENS = torch.arange(17) * 7 % VOCAB_SIZE


def their_config(name: str) -> ModelConfig:
    return resolve(build(MODELS[name].settings | {"training.micro_batch_size": 1, "training.train_iters": 1}), 1).model


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_family_goes_in_and_out(tmp_path: Path, name: str) -> None:
    model = build_model(name, torch.float64)
    with torch.no_grad():
        want = model(input_ids=TOKENS.unsqueeze(0), use_cache=False).logits[0]
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs)
    with open_folder(theirs) as weights:
        assert weights.config.model == their_config(name)
        checkpoint = write_native(tmp_path / "ours", weights)
    with open_native(checkpoint) as weights:
        verdict = judge(want, our_logits(weights, TOKENS, torch.float64), TOKENS)
        assert verdict.share < 1e-10 and abs(verdict.losses[0] - verdict.losses[1]) < 1e-10
        write_folder(tmp_path / "back", weights)
        write_folder(tmp_path / "narrow", weights, torch.float32)
    with open_folder(theirs) as before, open_folder(tmp_path / "back") as after:
        assert after.config.model == before.config.model
        assert not list(compare(before, after))
    # Streamed, each module reads its own weights and forgets them.
    assert judge(their_logits(tmp_path / "back", TOKENS), want.float(), TOKENS).share < 1e-5
    with open_folder(tmp_path / "narrow") as weights:
        verdict = judge(their_logits(tmp_path / "narrow", TOKENS), our_logits(weights, TOKENS), TOKENS)
        assert verdict.share < 1e-5


@pytest.mark.slow
def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    source, target = Place("hf", tmp_path / "theirs"), Place("megallm", tmp_path / "ours")
    build_model("llama", torch.float32).save_pretrained(source.path)
    written = convert(source, target, Output(None, ParallelConfig(), "local", False, 10**9, False))
    lines: list[str] = []
    check(source, written, None, None, lines.append)
    assert lines[0] == "verified tensor by tensor: all 30 are equal"
    assert "verified on 20 tokens: largest difference of logits" in lines[1] and "bound 1e-04" in lines[1]
    config = json.loads((source.path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    config.pop("rope_theta", None)
    (source.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"logits differ by .* of the largest, more than the bound of 1e-04"):
        check(source, written, None, None, lines.append)


def test_a_model_that_no_family_holds_is_refused_by_its_feature() -> None:
    def refusal(**changes: object) -> str:
        model = replace(their_config("llama"), **changes)  # type: ignore[arg-type]
        with pytest.raises(ValueError) as raised:
            choose_family(config_of(model), None)
        return str(raised.value)

    assert "LlamaForCausalLM architecture does not have this model's rotary_interleaved True (it has False)" in refusal(
        rotary_interleaved=True
    )
    assert "activation 'squared_relu' (it has swiglu)" in refusal(activation="squared_relu")
    assert "rotary_percent 0.5 (it has 1.0)" in refusal(rotary_percent=0.5)


def test_the_family_of_the_origin_is_kept_where_it_fits() -> None:
    config = config_of(their_config("llama"))
    assert choose_family(config, None)[0].model_type == "llama"
    assert choose_family(config, "mistral")[0].model_type == "mistral"
    assert choose_family(config, "gpt2")[0].model_type == "llama"
    windowed = replace(config, model=replace(config.model, window_size="3,0"))
    assert choose_family(windowed, "llama")[1]["sliding_window"] == 4


def test_the_default_model_is_none_of_hugging_faces() -> None:
    """A GPT with the exact gelu and learned positions is a GPT-2, with sinusoidal ones it is nothing."""
    model = replace(their_config("gpt2"), activation="gelu")
    assert choose_family(Config(model=model), None)[1]["activation_function"] == "gelu"
    with pytest.raises(ValueError, match="position_embedding_type 'sinusoidal'"):
        choose_family(Config(model=replace(model, position_embedding_type="sinusoidal")), None)
