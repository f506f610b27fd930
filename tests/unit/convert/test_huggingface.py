"""Hugging Face folders to our checkpoints and back, and what is wrong with folders, each in a sentence."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megallm.checkpoint.boxes import WEIGHTS
from megallm.checkpoint.load import verify
from megallm.checkpoint.reading import open_checkpoint
from megallm.convert import command
from megallm.convert.command import Place, check
from megallm.convert.huggingface import open_folder, read_settings, write_folder
from megallm.convert.native import KEPT, open_native, write_native
from megallm.generate.choice import SamplingSettings
from megallm.generate.text import continue_texts
from megallm.train.trained import Placement, trained_model
from tests.unit.convert import folders
from tests.unit.convert.folders import GPT2_CONFIG, HIDDEN, LLAMA_CONFIG, VOCAB

TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


def llama(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    return folders.write(folder, LLAMA_CONFIG | changes, folders.make_tensors(folders.llama_shapes(), dtype))


def to_ours(folder: Path, root: Path, dtype: torch.dtype | None = None) -> Path:
    with open_folder(folder) as weights:
        return write_native(root, weights, dtype)


def to_theirs(checkpoint: Path, folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    with open_native(checkpoint) as weights:
        write_folder(folder, weights, dtype, **options)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_llama_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = llama(tmp_path / "theirs", dtype)
    checkpoint = to_ours(folder, tmp_path / "ours")
    list(verify(checkpoint))
    back = to_theirs(checkpoint, tmp_path / "back")
    before, after = folders.read(folder), folders.read(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name
    config = json.loads((back / "config.json").read_text())
    assert {key: config[key] for key in LLAMA_CONFIG if key != "torch_dtype"} == {
        key: value for key, value in LLAMA_CONFIG.items() if key != "torch_dtype"
    }
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_each_tensor_of_a_llama_has_its_place(tmp_path: Path) -> None:
    folder = llama(tmp_path / "theirs")
    theirs = folders.read(folder)
    with open_checkpoint(to_ours(folder, tmp_path / "ours")) as checkpoint:
        ours = dict(checkpoint.tensors(WEIGHTS))
    places = {
        "embedding.word.weight": "model.embed_tokens.weight",
        "decoder.layers.1.attention_norm.weight": "model.layers.1.input_layernorm.weight",
        "decoder.layers.1.attention.query.weight": "model.layers.1.self_attn.q_proj.weight",
        "decoder.layers.1.attention.key.weight": "model.layers.1.self_attn.k_proj.weight",
        "decoder.layers.1.attention.value.weight": "model.layers.1.self_attn.v_proj.weight",
        "decoder.layers.1.attention.output.weight": "model.layers.1.self_attn.o_proj.weight",
        "decoder.layers.1.mlp_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "decoder.layers.1.mlp.gate.weight": "model.layers.1.mlp.gate_proj.weight",
        "decoder.layers.1.mlp.up.weight": "model.layers.1.mlp.up_proj.weight",
        "decoder.layers.1.mlp.down.weight": "model.layers.1.mlp.down_proj.weight",
        "decoder.final_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    assert len(ours) == len(theirs)
    for name, their_name in places.items():
        assert torch.equal(ours[name], theirs[their_name]), name


def test_gpt2_without_its_prefix(tmp_path: Path) -> None:
    theirs = folders.make_tensors(folders.gpt2_shapes())
    folder = folders.write(tmp_path / "theirs", GPT2_CONFIG, theirs)
    checkpoint = to_ours(folder, tmp_path / "ours")
    with open_checkpoint(checkpoint) as opened:
        ours = dict(opened.tensors(WEIGHTS))
    # [in, 3 out] -> [out, in]
    key = theirs["h.1.attn.c_attn.weight"][:, HIDDEN : 2 * HIDDEN].t()
    assert torch.equal(ours["decoder.layers.1.attention.key.weight"], key)
    assert torch.equal(
        ours["decoder.layers.1.attention.value.bias"], theirs["h.1.attn.c_attn.bias"][2 * HIDDEN : 3 * HIDDEN]
    )
    assert torch.equal(ours["decoder.layers.0.mlp.down.weight"], theirs["h.0.mlp.c_proj.weight"].t())
    back = folders.read(to_theirs(checkpoint, tmp_path / "back"))
    assert back.keys() == {f"transformer.{name}" for name in theirs if not name.endswith(".attn.bias")}
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[name.removeprefix("transformer.")]), name


def test_shards_have_an_index_and_no_more_than_they_may(tmp_path: Path) -> None:
    checkpoint = to_ours(llama(tmp_path / "theirs"), tmp_path / "ours")
    folder = to_theirs(checkpoint, tmp_path / "back", max_shard_bytes=500)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(names)
    for name in names:
        tensors = folders.load_file(folder / name)
        assert {key for key, place in index["weight_map"].items() if place == name} == tensors.keys()
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 500
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in folders.read(folder).values())
    before = folders.read(tmp_path / "theirs")
    again = folders.read(to_theirs(to_ours(folder, tmp_path / "again"), tmp_path / "back again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_types_are_cast_where_that_is_asked(tmp_path: Path) -> None:
    folder = llama(tmp_path / "theirs", torch.float32)
    back = to_theirs(to_ours(folder, tmp_path / "ours"), tmp_path / "back", torch.bfloat16)
    before, after = folders.read(folder), folders.read(back)
    assert all(torch.equal(after[name], tensor.to(torch.bfloat16)) for name, tensor in before.items())
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_goes_with_a_model_is_kept(tmp_path: Path) -> None:
    folder = llama(tmp_path / "theirs", bos_token_id=1, eos_token_id=[0, 2])
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    written_by_5 = {"tokenizer_class": "TokenizersBackend", "eos_token": "a", "extra_special_tokens": ["b"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(written_by_5))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    checkpoint = to_ours(folder, tmp_path / "ours")
    with open_native(checkpoint) as weights:
        assert weights.config.data.tokenizer_model == str(tmp_path / "ours" / KEPT)
    shutil.rmtree(folder)
    # The path that the checkpoint names is no longer right.
    (tmp_path / "ours").rename(tmp_path / "moved")
    back = to_theirs(tmp_path / "moved" / checkpoint.name, tmp_path / "back")
    assert json.loads((back / "tokenizer.json").read_text()) == TOKENIZER
    assert json.loads((back / "generation_config.json").read_text()) == {"temperature": 0.6}
    config = json.loads((back / "config.json").read_text())
    assert config["bos_token_id"] == 1 and config["eos_token_id"] == [0, 2]
    # Version 4 does not know the class, and wants the list under another name.
    read_by_4 = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a", "additional_special_tokens": ["b"]}
    assert json.loads((back / "tokenizer_config.json").read_text()) == read_by_4


def test_a_converted_model_writes_as_a_trained_one_does(tmp_path: Path) -> None:
    folder = llama(tmp_path / "theirs", torch.float32)
    vocabulary = TOKENIZER["model"] | {"vocab": {"a": 0, "b": 1, "<|endoftext|>": 2}}
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"model": vocabulary}))
    to_ours(folder, tmp_path / "ours")
    with trained_model(str(tmp_path / "ours"), Placement(device="cpu")) as (model, tokenizer):
        texts = continue_texts(model, tokenizer, ["ab", "b"], 3, [SamplingSettings(temperature=0.0)] * 2)
    assert len(texts) == 2


def test_a_head_that_repeats_the_embedding_is_left_away(tmp_path: Path) -> None:
    tensors = folders.make_tensors(folders.llama_shapes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = folders.write(tmp_path / "theirs", LLAMA_CONFIG | {"tie_word_embeddings": True}, tensors)
    back = folders.read(to_theirs(to_ours(folder, tmp_path / "ours"), tmp_path / "back"))
    assert back.keys() == tensors.keys() - {"lm_head.weight"}
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"ties its head to the embedding, but lm_head\.weight is another matrix"):
        to_ours(folder, tmp_path / "other")


def test_output_is_not_overwritten_unless_that_is_asked(tmp_path: Path) -> None:
    folder = llama(tmp_path / "theirs")
    checkpoint = to_ours(folder, tmp_path / "ours")
    for write in (lambda: to_ours(folder, tmp_path / "ours"), lambda: to_theirs(checkpoint, folder)):
        with pytest.raises(ValueError, match=r"is there already; give another folder, or --overwrite"):
            write()
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "old").touch()
    to_theirs(checkpoint, tmp_path / "back", overwrite=True)
    assert not (tmp_path / "back" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "theirs"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = llama(tmp_path / "theirs")
    checkpoint = to_ours(folder, tmp_path / "ours")
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged between bytes"):
        to_theirs(checkpoint, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path) -> None:
    checkpoint = to_ours(llama(tmp_path / "theirs"), tmp_path / "ours")
    left = tmp_path / "back.0123456789abcdef.tmp"
    left.mkdir()
    (tmp_path / "back.tmp").mkdir()
    to_theirs(checkpoint, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "back.tmp", "ours", "theirs"]


def test_what_stepped_aside_counts_until_the_new_one_has_its_name(tmp_path: Path) -> None:
    checkpoint = to_ours(llama(tmp_path / "theirs"), tmp_path / "ours")
    # As a conversion with --overwrite leaves it that was killed between its two renames.
    (tmp_path / "theirs").rename(tmp_path / "theirs.0123456789abcdef.replaced")
    (tmp_path / "theirs.0123456789abcdef.tmp").mkdir()
    with Place("hf", tmp_path / "theirs").open() as weights:
        assert weights.config.model.num_layers == folders.LAYERS
    with pytest.raises(ValueError, match="theirs is there already"):
        to_theirs(checkpoint, tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    assert (tmp_path / "theirs" / "config.json").exists()
    # After the second one only the removal is missing.
    shutil.copytree(tmp_path / "theirs", tmp_path / "theirs.0123456789abcdef.replaced")
    to_theirs(checkpoint, tmp_path / "theirs", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_what_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = to_ours(llama(tmp_path / "theirs"), tmp_path / "ours")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ValueError, match="theirs cannot be written: Input/output error"):
        to_theirs(checkpoint, tmp_path / "theirs", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    assert (tmp_path / "theirs" / "config.json").exists()


def test_without_the_library_the_tensors_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "has_transformers", lambda: False)
    folder = llama(tmp_path / "theirs", torch.float32)
    ours = Place("megallm", to_ours(folder, tmp_path / "ours", torch.bfloat16))
    lines: list[str] = []
    check(Place("hf", folder), ours, torch.bfloat16, None, lines.append)
    assert lines == [
        "verified tensor by tensor: all 21 are equal",
        "transformers is not installed: logits were not compared",
    ]
    with pytest.raises(ValueError, match=r"embedding\.word\.weight differs by .* at \[\d+, \d\] after conversion"):
        check(Place("hf", folder), ours, None, None, lines.append)


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = to_ours(llama(tmp_path / "theirs"), tmp_path / "ours")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"the output takes 0\.000 GB, and .* has 0\.000 GB free"):
        to_theirs(checkpoint, tmp_path / "back")
    with pytest.raises(ValueError, match=r"it takes [\d,]+ bytes, and .* has 100 free"):
        to_ours(tmp_path / "theirs", tmp_path / "other")
    assert not (tmp_path / "back").exists()


def remove(name: str) -> Any:
    def change(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def put(name: str, tensor: torch.Tensor) -> Any:
    def change(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensor

    return change


def tokenizer_of(size: int) -> Any:
    def change(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        content = {"model": {"vocab": {str(number): number for number in range(size)}}}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return change


def cut_short(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def lose_a_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    index = {"weight_map": dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def name_no_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": 1}}))


def point(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


BAD_FOLDERS = [
    (
        {"architectures": ["LlamaForCausalML"]},
        None,
        r"architecture 'LlamaForCausalML'; known are LlamaForCausalLM, M",
    ),
    ({"architectures": ["LlamaForCausalML"]}, None, r"the nearest is LlamaForCausalLM"),
    ({"architectures": [], "model_type": "mamba"}, None, r"describes the architecture 'mamba'; known are"),
    ({"architectures": ["Gemma2ForCausalLM"]}, None, r"does not have its norms behind the attention and the MLP, caps"),
    ({"hidden_size": None}, None, r"config\.json of a llama model needs hidden_size"),
    ({"hidden_size": "8"}, None, r"llama model describes none that can be: hidden_size takes a whole number, not '8'"),
    ({"num_attention_heads": None}, None, r"config\.json of a llama model needs num_attention_heads"),
    ({"num_attention_heads": -4}, None, r"num_attention_heads is -4, and must be at least 1"),
    ({"num_attention_heads": 0}, None, r"describes none that can be: integer division or modulo by zero"),
    ({"rope_scaling": {"type": "linear"}}, None, r"config\.json of a llama model needs factor"),
    ({"rope_scaling": [2]}, None, r"config\.json of a llama model describes none that can be: unsupported operand"),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        None,
        r"not alike: rope_type is 'default' in rope_parameters and 'linear' in rope_scaling; leave only",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e4}},
        None,
        r"rope_theta is 500000\.0, and rope_theta in rope_parameters 10000\.0",
    ),
    ({"attention_bias": True}, None, r"attention_bias = True \(biases of all four projections of the attention"),
    ({"hidden_act": "gelu"}, None, r"the activation 'gelu' is not one that megallm has; known are silu"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, None, r"rotary positions of the kind 'yarn'"),
    ({"quantization_config": {}}, None, r"holds quantized weights"),
    ({}, remove("model.norm.weight"), r"model\.norm\.weight of shape \[8\] is missing"),
    ({}, put("model.norm.weight", torch.ones(7)), r"model\.norm\.weight has shape \[7\], but config\.json wants \[8\]"),
    (
        {},
        put("model.extra.weight", torch.ones(2)),
        r"model\.extra\.weight of shape \[2\] is none of a LlamaForCausalLM",
    ),
    ({"vocab_size": VOCAB + 1}, None, r"embed_tokens\.weight has shape \[11, 8\], but config\.json wants \[12, 8\]"),
    ({}, tokenizer_of(VOCAB + 2), r"has 13 tokens, but the model's vocabulary has 11: its last 2 would have no embed"),
    ({}, point, r"it is a pointer of Git LFS, and `git lfs pull` fetches"),
    ({}, cut_short, r"model\.safetensors is not a whole file of safetensors: .* would end at byte"),
    ({}, name_no_shard, r"is not an index of weights: it has no weight_map of names of files"),
    ({}, lose_a_shard, r"1 of the 1 files that .* names are not there: model-00002-of-00002\.safetensors"),
]


@pytest.mark.parametrize(("changes", "change", "message"), BAD_FOLDERS, ids=[message for _, _, message in BAD_FOLDERS])
def test_a_bad_folder_is_answered_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any], change: Any, message: str
) -> None:
    tensors = folders.make_tensors(folders.llama_shapes())
    folder = folders.write(tmp_path / "theirs", LLAMA_CONFIG | changes, tensors)
    if change is not None:
        change(folder, tensors)
        if tensors:
            save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        to_ours(folder, tmp_path / "ours")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ours").exists()


def test_a_checkpoint_keeps_its_tokenizer_until_another_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = folders.make_tensors(folders.llama_shapes())
    for name, size in (("one", VOCAB), ("two", VOCAB - 1)):
        tokenizer_of(size)(folders.write(tmp_path / name, LLAMA_CONFIG, tensors), tensors)
    to_ours(tmp_path / "one", tmp_path / "ours")
    file, content = "tokenizer.json", (tmp_path / "one" / "tokenizer.json").read_bytes()

    def break_off(*_: Any) -> None:
        raise KeyboardInterrupt

    with open_folder(tmp_path / "two") as weights:
        monkeypatch.setattr(weights.tensors, "fill", break_off)
        with pytest.raises(KeyboardInterrupt):
            write_native(tmp_path / "ours", weights, overwrite=True)
        monkeypatch.undo()
        assert (tmp_path / "ours" / KEPT / file).read_bytes() == content
        write_native(tmp_path / "ours", weights, overwrite=True)
    assert (tmp_path / "ours" / KEPT / file).read_bytes() != content
    assert sorted(path.name for path in (tmp_path / "ours").iterdir() if path.is_dir()) == [KEPT, "iter_0000000"]


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read: No such file"):
        to_ours(tmp_path, tmp_path / "ours")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    with pytest.raises(
        ValueError, match=r"but no weights: neither model\.safetensors nor .* nor pytorch_model\.bin nor"
    ):
        to_ours(tmp_path, tmp_path / "ours")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made",)


def test_pickled_weights_are_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = folders.make_tensors(folders.llama_shapes(), torch.bfloat16)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    names = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    places = {name: names[number % 2] for number, name in enumerate(tensors)}
    for file in names:
        held = OrderedDict((name, tensors[name]) for name, place in places.items() if place == file)
        torch.save(held, tmp_path / "theirs" / file)
    index = tmp_path / "theirs" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    back = folders.read(to_theirs(to_ours(tmp_path / "theirs", tmp_path / "ours"), tmp_path / "back"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    index.unlink()
    single = tmp_path / "theirs" / "pytorch_model.bin"
    for content, message in (
        (tensors | {"extra": Evil()}, r"pytorch_model\.bin is not a file .* can be trusted: it names posix\.mkdir"),
        (tensors | {"step": 5}, r"holds what are no tensors of weights: step"),
        ([1], "does not hold a dictionary of tensors"),
    ):
        torch.save(content, single)
        with pytest.raises(ValueError, match=message):
            to_ours(tmp_path / "theirs", tmp_path / "other")
    torch.save(tensors, single, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"it is cut off, or from before torch 1\.6; then load it with torch"):
        to_ours(tmp_path / "theirs", tmp_path / "other")
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_of_ours_is_no_model_of_theirs(tmp_path: Path) -> None:
    checkpoint = to_ours(llama(tmp_path / "theirs"), tmp_path / "ours")
    for folder in (checkpoint, checkpoint.parent):
        with pytest.raises(
            ValueError, match=r"holds checkpoints of megallm's .*: --load continues their run, and --pre"
        ):
            read_settings(folder)
