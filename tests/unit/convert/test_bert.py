"""BERT to and from Hugging Face and Megatron-LM: every tensor's place and bits, and what comes without its heads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megallm.checkpoint.boxes import WEIGHTS
from megallm.checkpoint.reading import open_checkpoint
from megallm.config.tree import ParallelConfig
from megallm.convert.command import Output, Place, check, convert
from megallm.convert.compare import compare
from megallm.convert.huggingface import choose_family, open_folder, write_folder
from megallm.convert.megatron.folder import find_iteration, open_megatron, write_torch_folder
from megallm.convert.native import open_native, write_native
from megallm.convert.verify import judge, our_logits, their_logits
from tests.unit.convert import folders
from tests.unit.convert.folders import HEADS, HIDDEN, LAYERS, POSITIONS, VOCAB

FFN = 12
CONFIG = {
    "architectures": ["BertForPreTraining"],
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
}
WORDS = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
ORDER = ("bert.pooler.dense", "cls.seq_relationship")


def bert_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers saves them for pretraining."""
    tables = {"word": VOCAB, "position": POSITIONS, "token_type": 2}
    shapes = {f"bert.embeddings.{name}_embeddings.weight": (rows, HIDDEN) for name, rows in tables.items()}
    linear = {ORDER[0]: (HIDDEN, HIDDEN), ORDER[1]: (2, HIDDEN), WORDS[0]: (HIDDEN, HIDDEN)}
    norms = ["bert.embeddings.LayerNorm", WORDS[1]]
    for layer in range(LAYERS):
        scope = f"bert.encoder.layer.{layer}"
        linear |= {f"{scope}.attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}
        linear |= {f"{scope}.attention.output.dense": (HIDDEN, HIDDEN)}
        linear |= {f"{scope}.intermediate.dense": (FFN, HIDDEN), f"{scope}.output.dense": (HIDDEN, FFN)}
        norms += [f"{scope}.attention.output.LayerNorm", f"{scope}.output.LayerNorm"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
    return shapes | {"cls.predictions.bias": (VOCAB,)}


def bert(
    folder: Path, leave_out: tuple[str, ...] = (), add: dict[str, torch.Tensor] | None = None, **changes: Any
) -> Path:
    tensors = folders.make_tensors(bert_shapes()) | (add or {})
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(leave_out)}
    return folders.write(folder, CONFIG | changes, tensors)


def ours_of(folder: Path, root: Path) -> dict[str, torch.Tensor]:
    with open_folder(folder) as weights:
        written = write_native(root, weights)
    with open_checkpoint(written) as checkpoint:
        return dict(checkpoint.tensors(WEIGHTS))


def test_each_tensor_has_its_place_and_comes_back(tmp_path: Path) -> None:
    theirs = folders.read(bert(tmp_path / "theirs"))
    ours = ours_of(tmp_path / "theirs", tmp_path / "ours")
    places = {
        "embedding.type.weight": "bert.embeddings.token_type_embeddings.weight",
        "encoder.layers.0.attention_norm.weight": "bert.embeddings.LayerNorm.weight",
        "encoder.layers.0.mlp_norm.bias": "bert.encoder.layer.0.attention.output.LayerNorm.bias",
        "encoder.layers.1.attention_norm.bias": "bert.encoder.layer.0.output.LayerNorm.bias",
        "encoder.final_norm.weight": "bert.encoder.layer.1.output.LayerNorm.weight",
        "encoder.layers.1.attention.value.bias": "bert.encoder.layer.1.attention.self.value.bias",
        "encoder.layers.1.mlp.up.weight": "bert.encoder.layer.1.intermediate.dense.weight",
        "head.transform.bias": "cls.predictions.transform.dense.bias",
        "head.norm.weight": "cls.predictions.transform.LayerNorm.weight",
        "output.bias": "cls.predictions.bias",
        "pooler.weight": "bert.pooler.dense.weight",
        "next_sentence.weight": "cls.seq_relationship.weight",
    }
    assert len(ours) == len(theirs)
    for name, their_name in places.items():
        assert torch.equal(ours[name], theirs[their_name]), name
    with open_native(tmp_path / "ours" / "iter_0000000") as weights:
        write_folder(tmp_path / "back", weights)
    back = folders.read(tmp_path / "back")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in CONFIG} == CONFIG


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    """With gamma and beta, with copies of what is tied, and with heads that the architecture does not have."""
    tensors = folders.make_tensors(bert_shapes())
    want = ours_of(folders.write(tmp_path / "new", CONFIG, tensors), tmp_path / "ours")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"].clone()
    old["bert.embeddings.position_ids"] = torch.arange(POSITIONS).unsqueeze(0)
    folder = folders.write(tmp_path / "old", CONFIG | {"architectures": ["BertForMaskedLM"]}, old)
    with open_folder(folder) as weights:
        assert not weights.config.model.bert_binary_head and weights.config.model.num_token_types == 2
        (note,) = weights.notes
        assert "bert.pooler.dense.weight" in note and "a BertForMaskedLM has no use: they stay behind" in note
    ours = ours_of(folder, tmp_path / "old ours")
    assert want.keys() - ours.keys() == {
        f"{name}.{part}" for name in ("pooler", "next_sentence") for part in ("weight", "bias")
    }
    assert all(torch.equal(want[name], tensor) for name, tensor in ours.items())


def test_an_encoder_without_heads_gets_new_ones_and_says_so(tmp_path: Path) -> None:
    kept = {
        name.removeprefix("bert."): tensor
        for name, tensor in folders.make_tensors(bert_shapes()).items()
        if not name.startswith("cls.")
    }
    folder = folders.write(tmp_path / "theirs", CONFIG | {"architectures": ["BertModel"]}, kept)
    with open_folder(folder) as weights:
        assert weights.config.model.bert_binary_head
        (note,) = weights.notes
        assert "without head.transform.weight" in note and "begin with their initial values" in note
        assert "pooler.weight" not in weights.fresh and len(weights.fresh) == 7
    ours = ours_of(folder, tmp_path / "ours")
    assert torch.equal(ours["pooler.weight"], kept["pooler.dense.weight"])
    assert torch.equal(ours["head.norm.weight"], torch.ones(HIDDEN))
    assert ours["head.transform.weight"].std() == pytest.approx(0.02, rel=0.3)
    lines: list[str] = []
    check(Place("hf", folder), Place("megallm", tmp_path / "ours"), None, None, lines.append)
    assert lines[0] == f"verified tensor by tensor: all {len(ours)} are equal"


def test_what_a_bert_of_theirs_lacks_is_named(tmp_path: Path) -> None:
    headless = bert(tmp_path / "headless", leave_out=("cls.seq_relationship",))
    with pytest.raises(ValueError, match=r"cls.seq_relationship.weight of shape \[2, 8\] is missing"):
        open_folder(headless).__enter__()
    untied = bert(tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings = False"):
        open_folder(untied).__enter__()
    with open_folder(bert(tmp_path / "theirs")) as weights:
        config = weights.config

    def refusal(**changes: Any) -> str:
        with pytest.raises(ValueError) as raised:
            choose_family(replace(config, model=replace(config.model, **changes)), None)
        return str(raised.value)

    assert "apply_residual_connection_post_layernorm False" in refusal(apply_residual_connection_post_layernorm=False)
    assert "num_token_types 0" in refusal(bert_binary_head=False, num_token_types=0)


@pytest.mark.parametrize(("tp", "pp", "has_order"), [(1, 1, True), (2, 2, True), (2, 1, False)])
def test_megatron_and_back(tmp_path: Path, tp: int, pp: int, has_order: bool) -> None:
    left = () if has_order else ORDER
    kind = CONFIG["architectures"] if has_order else ["BertForMaskedLM"]
    folder = bert(tmp_path / "theirs", leave_out=left, architectures=kind)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    with open_folder(folder) as weights:
        if not has_order:
            # Theirs has types of tokens where there are pairs, and only there.
            with pytest.raises(ValueError, match="does not have this model's num_token_types 2"):
                write_torch_folder(tmp_path / "megatron", weights, parallel)
            return
        write_torch_folder(tmp_path / "megatron", weights, parallel)
    with open_folder(folder) as before, open_megatron(find_iteration(tmp_path / "megatron", None)) as after:
        assert after.config.model == before.config.model
        assert not list(compare(before, after))
    file = f"mp_rank_{tp - 1:02d}" + (f"_{pp - 1:03d}" if pp > 1 else "")
    content = torch.load(tmp_path / "megatron" / "release" / file / "model_optim_rng.pt", weights_only=False)
    model, theirs = content["model"], folders.read(folder)
    assert content["args"].bert_binary_head
    rows = content["args"].padded_vocab_size // tp
    assert rows == 128
    bias = torch.cat((theirs["cls.predictions.bias"], torch.zeros(rows * tp - VOCAB)))
    assert torch.equal(model["output_layer.bias"], bias[(tp - 1) * rows :])
    assert torch.equal(model["lm_head.dense.weight"], theirs["cls.predictions.transform.dense.weight"])
    assert torch.equal(model["lm_head.layer_norm.bias"], theirs["cls.predictions.transform.LayerNorm.bias"])
    assert torch.equal(model["pooler.dense.weight"], theirs["bert.pooler.dense.weight"])
    assert torch.equal(model["binary_head.bias"], theirs["cls.seq_relationship.bias"])
    last = LAYERS - 1
    assert torch.equal(
        model["encoder.final_layernorm.weight"], theirs[f"bert.encoder.layer.{last}.output.LayerNorm.weight"]
    )
    fc2 = theirs[f"bert.encoder.layer.{last}.output.dense.weight"].chunk(tp, dim=1)[-1]
    assert torch.equal(model[f"encoder.layers.{LAYERS // pp - 1}.mlp.linear_fc2.weight"], fc2)
    assert ("output_layer.weight" in model) == (pp > 1)
    if pp == 1:
        types = theirs["bert.embeddings.token_type_embeddings.weight"]
        assert torch.equal(model["embedding.tokentype_embeddings.weight"], types)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_distributed_format_of_megatron_is_read(tmp_path: Path) -> None:
    """The tensors of one rank, all layers stacked."""
    folder = bert(tmp_path / "theirs")
    with open_folder(folder) as weights:
        write_torch_folder(tmp_path / "one", weights, ParallelConfig())
    content = torch.load(tmp_path / "one" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    layers: dict[str, list[torch.Tensor]] = {}
    for name, tensor in content["model"].items():
        layers.setdefault(re.sub(r"layers\.\d+\.", "layers.", name), []).append(tensor)
    whole = {name: torch.stack(found) if ".layers." in name else found[0] for name, found in layers.items()}
    place = tmp_path / "megatron" / "iter_0000003"
    place.mkdir(parents=True)
    save(whole, storage_writer=FileSystemWriter(place), no_dist=True)
    torch.save({"args": content["args"], "iteration": 3, "checkpoint_version": 3.0}, place / "common.pt")
    with open_folder(folder) as before, open_megatron(place) as after:
        assert after.config.model == before.config.model
        assert not list(compare(before, after))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM"])
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = torch.arange(13) * 7 % VOCAB
    config = transformers.BertConfig(**CONFIG | {"initializer_range": 0.3})
    model = getattr(transformers, name)(config).double().eval()
    model.save_pretrained(tmp_path / "theirs")
    outputs = model(input_ids=tokens.unsqueeze(0))
    want = outputs["prediction_logits" if name == "BertForPreTraining" else "logits"][0].detach()
    output = Output(None, ParallelConfig(), "local", False, 10**9, False)
    written = convert(Place("hf", tmp_path / "theirs"), Place("megallm", tmp_path / "ours"), output)
    with open_native(written.path) as weights:
        assert judge(want, our_logits(weights, tokens, torch.float64), tokens, "bert").share < 1e-10
        write_folder(tmp_path / "back", weights, torch.float32)
    again = getattr(transformers, name).from_pretrained(tmp_path / "back")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert judge(their_logits(tmp_path / "back", tokens), want.float(), tokens, "bert").share < 1e-5
    lines: list[str] = []
    check(Place("hf", tmp_path / "back"), Place("megallm", written.path.parent), torch.float32, None, lines.append)
    assert "verified on 16 tokens: largest difference of logits" in lines[1]
