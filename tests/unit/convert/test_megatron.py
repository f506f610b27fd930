"""Megatron-LM's folders, made here by hand after the description of their format, and read and written by us."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megallm.config.tree import ModelConfig, ParallelConfig
from megallm.convert.compare import compare
from megallm.convert.huggingface import open_folder
from megallm.convert.megatron.arguments import read_arguments, write_arguments
from megallm.convert.megatron.folder import find_iteration, open_megatron, write_torch_folder
from megallm.convert.model import Weights, config_of
from tests.unit.convert import folders

VOCAB, PADDED, HIDDEN, FFN, HEADS, GROUPS, WIDTH, LAYERS = 11, 16, 8, 12, 4, 2, 2, 4
ARGUMENTS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "group_query_attention": True,
    "num_query_groups": GROUPS,
    "kv_channels": WIDTH,
    "max_position_embeddings": 16,
    "seq_length": 16,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": VOCAB,
    "padded_vocab_size": PADDED,
    "num_experts": None,
    "params_dtype": torch.float32,
}
# A model that has every tensor there is: of the one above, all biases are left out but those of QKV.
WITH_ALL = ARGUMENTS | {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "qk_layernorm": True,
}


def logical(has_all: bool = False) -> dict[str, torch.Tensor]:
    """A model's tensors by our names."""
    generator = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word.weight": (VOCAB, HIDDEN)}
    if has_all:
        shapes["embedding.position.weight"] = (16, HIDDEN)
    for layer in range(LAYERS):
        if has_all:
            shapes |= {
                f"decoder.layers.{layer}.{name}": shape
                for name, shape in {
                    "attention_norm.bias": (HIDDEN,),
                    "attention.query_norm.weight": (WIDTH,),
                    "attention.query_norm.bias": (WIDTH,),
                    "attention.key_norm.weight": (WIDTH,),
                    "attention.key_norm.bias": (WIDTH,),
                    "attention.output.bias": (HIDDEN,),
                    "mlp_norm.bias": (HIDDEN,),
                    "mlp.gate.bias": (FFN,),
                    "mlp.up.bias": (FFN,),
                    "mlp.down.bias": (HIDDEN,),
                }.items()
            }
        shapes |= {
            f"decoder.layers.{layer}.{name}": shape
            for name, shape in {
                "attention_norm.weight": (HIDDEN,),
                "attention.query.weight": (HEADS * WIDTH, HIDDEN),
                "attention.key.weight": (GROUPS * WIDTH, HIDDEN),
                "attention.value.weight": (GROUPS * WIDTH, HIDDEN),
                "attention.query.bias": (HEADS * WIDTH,),
                "attention.key.bias": (GROUPS * WIDTH,),
                "attention.value.bias": (GROUPS * WIDTH,),
                "attention.output.weight": (HIDDEN, HEADS * WIDTH),
                "mlp_norm.weight": (HIDDEN,),
                "mlp.gate.weight": (FFN, HIDDEN),
                "mlp.up.weight": (FFN, HIDDEN),
                "mlp.down.weight": (HIDDEN, FFN),
            }.items()
        }
    shapes |= {"decoder.final_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    if has_all:
        shapes["decoder.final_norm.bias"] = (HIDDEN,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def qkv(tensors: dict[str, torch.Tensor], layer: int, suffix: str) -> torch.Tensor:
    """For each group: its query heads, its key, its value."""
    query, key, value = (tensors[f"decoder.layers.{layer}.attention.{n}.{suffix}"] for n in ("query", "key", "value"))
    rows = []
    for group in range(GROUPS):
        heads = HEADS // GROUPS
        rows.append(query[group * heads * WIDTH : (group + 1) * heads * WIDTH])
        rows.append(key[group * WIDTH : (group + 1) * WIDTH])
        rows.append(value[group * WIDTH : (group + 1) * WIDTH])
    return torch.cat(rows)


def padded(table: torch.Tensor) -> torch.Tensor:
    # What is in the padding is nobody's business.
    return torch.cat((table, torch.full((PADDED - VOCAB, HIDDEN), 9.0)))


def layer_of(tensors: dict[str, torch.Tensor], layer: int, rank: int, tp: int, is_engine: bool) -> dict[str, Any]:
    """What a tensor rank has of a layer."""
    scope = f"decoder.layers.{layer}."
    norms = ("input_layernorm.", "pre_mlp_layernorm.")
    if is_engine:
        norms = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
    found: dict[str, Any] = {}
    for suffix in ("weight", "bias"):
        whole = {
            theirs + suffix: tensors[name]
            for theirs, ours in {
                norms[0]: "attention_norm.",
                norms[1]: "mlp_norm.",
                "self_attention.q_layernorm.": "attention.query_norm.",
                "self_attention.k_layernorm.": "attention.key_norm.",
                "self_attention.linear_proj.": "attention.output.",
                "mlp.linear_fc2.": "mlp.down.",
            }.items()
            if (name := scope + ours + suffix) in tensors
        }
        # Of what cuts its columns every rank has the whole bias.
        for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
            if name in whole:
                whole[name] = whole[name].chunk(tp, dim=1)[rank].contiguous()
        found |= whole
        found[f"self_attention.linear_qkv.{suffix}"] = qkv(tensors, layer, suffix).chunk(tp)[rank]
        if f"{scope}mlp.gate.{suffix}" in tensors:
            gate, up = tensors[f"{scope}mlp.gate.{suffix}"], tensors[f"{scope}mlp.up.{suffix}"]
            found[f"mlp.linear_fc1.{suffix}"] = torch.cat((gate.chunk(tp)[rank], up.chunk(tp)[rank]))
    if is_engine:
        found["self_attention.linear_qkv._extra_state"] = None
        found["mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    return found


def write_torch(
    root: Path, tp: int, pp: int, virtual: int, is_engine: bool, has_all: bool = False, **changes: Any
) -> Path:
    """A folder of the `torch` format."""
    tensors, stages = logical(has_all), pp * virtual
    arguments = argparse.Namespace(
        **(WITH_ALL if has_all else ARGUMENTS)
        | {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        | changes
    )
    for rank in range(tp):
        for pipeline in range(pp):
            models: dict[str, Any] = {}
            for chunk in range(virtual):
                stage = chunk * pp + pipeline
                model: dict[str, Any] = collections.OrderedDict()
                if stage == 0:
                    model["embedding.word_embeddings.weight"] = padded(tensors["embedding.word.weight"]).chunk(tp)[rank]
                    if has_all:
                        model["embedding.position_embeddings.weight"] = tensors["embedding.position.weight"]
                each = LAYERS // stages
                for local in range(each):
                    part = layer_of(tensors, stage * each + local, rank, tp, is_engine)
                    model |= {f"decoder.layers.{local}.{name}": value for name, value in part.items()}
                if stage == stages - 1:
                    model["decoder.final_layernorm.weight"] = tensors["decoder.final_norm.weight"]
                    if has_all:
                        model["decoder.final_layernorm.bias"] = tensors["decoder.final_norm.bias"]
                    model["output_layer.weight"] = padded(tensors["output.weight"]).chunk(tp)[rank]
                # Rows are parts of larger memory, which torch then saves whole.
                models["model" if virtual == 1 else f"model{chunk}"] = model
            folder = root / "iter_0000005" / (f"mp_rank_{rank:02d}" + (f"_{pipeline:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            content = {"args": arguments, "checkpoint_version": 3.0, "iteration": 5, **models}
            content["rng_state"] = [{"cuda": torch.zeros(4, dtype=torch.uint8), "states": {"a": (1, 2.5, {3})}}]
            content["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(2)}}}
            torch.save(content, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


@contextmanager
def opened(root: Path, iteration: int | None = None) -> Iterator[Weights]:
    with open_megatron(find_iteration(root, iteration)) as weights:
        yield weights


def assert_is_the_model(weights: Weights, has_all: bool = False) -> None:
    want = logical(has_all)
    assert weights.shapes.keys() == want.keys()
    for name, tensor in want.items():
        found = torch.empty_like(tensor)
        weights.tensors.fill(name, (0,) * tensor.dim(), found)
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("is_engine", [False, True], ids=["local", "engine"])
@pytest.mark.parametrize("has_all", [False, True], ids=["some", "all"])
@pytest.mark.parametrize(("tp", "pp", "virtual"), [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 2), (4, 1, 1)])
def test_a_torch_folder_is_read(tmp_path: Path, tp: int, pp: int, virtual: int, has_all: bool, is_engine: bool) -> None:
    """At four tensor ranks each of the two groups is cut, and the last rank has nothing but padding."""
    with opened(write_torch(tmp_path, tp, pp, virtual, is_engine, has_all)) as weights:
        assert weights.iteration == 5
        model = weights.config.model
        assert (model.activation, model.num_query_groups, model.add_qkv_bias) == ("swiglu", GROUPS, True)
        assert not model.tie_embeddings and model.vocab_size == VOCAB
        assert_is_the_model(weights, has_all)


def test_the_true_vocabulary_is_what_the_arguments_or_the_user_say(tmp_path: Path) -> None:
    root = write_torch(tmp_path, 2, 1, 1, True, vocab_size=None)
    with opened(root) as weights:
        assert weights.config.model.vocab_size == PADDED
    with open_megatron(find_iteration(root, None), VOCAB) as weights:
        assert_is_the_model(weights)
        assert not weights.notes


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_rows_that_the_user_cuts_from_the_vocabulary_are_told(tmp_path: Path) -> None:
    for root in (write_torch(tmp_path / "one", 2, 1, 1, True), write_distributed(tmp_path / "two", True, False)):
        with open_megatron(find_iteration(root, None), VOCAB - 2) as weights:
            assert weights.config.model.vocab_size == VOCAB - 2
            assert weights.notes == (
                "--true-vocab-size 9 leaves the last 2 tokens of the 11 behind that the arguments name",
            )


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize(
    ("tp", "pp", "virtual", "has_all"), [(1, 1, 1, False), (2, 2, 2, False), (2, 2, 2, True), (4, 1, 1, True)]
)
def test_a_torch_folder_is_written(
    tmp_path: Path, tp: int, pp: int, virtual: int, has_all: bool, implementation: str
) -> None:
    source = write_torch(tmp_path / "source", 1, 2, 1, False, has_all)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=virtual
    )
    with opened(source) as weights:
        write_torch_folder(tmp_path / "new", weights, parallel, implementation=implementation)
    by_hand = write_torch(tmp_path / "hand", tp, pp, virtual, implementation != "local", has_all)
    assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").read_text() == "release"
    ranks = sorted(path.name for path in (by_hand / "iter_0000005").iterdir())
    assert sorted(path.name for path in (tmp_path / "new" / "release").iterdir()) == ranks
    for rank in ranks:
        got = torch.load(tmp_path / "new" / "release" / rank / "model_optim_rng.pt", weights_only=False)
        want = torch.load(by_hand / "iter_0000005" / rank / "model_optim_rng.pt", weights_only=False)
        assert got["checkpoint_version"] == 3.0
        for name in ARGUMENTS.keys() - {"padded_vocab_size", "num_experts"}:
            assert getattr(got["args"], name) == getattr(want["args"], name), name
        rows = got["args"].padded_vocab_size
        assert rows == 128 * tp
        for model in ("model", "model0", "model1"):
            tensors = {key: value for key, value in want.get(model, {}).items() if not key.endswith("_extra_state")}
            assert got.get(model, {}).keys() == tensors.keys()
            for key, value in tensors.items():
                found = got[model][key]
                if key.startswith(("embedding.word", "output_layer")):
                    # Padding is larger here, and zero: ranks after the first may have nothing else.
                    assert found.shape == (rows // tp, HIDDEN)
                    first = int(rank[8:10]) * rows // tp
                    name = "embedding.word.weight" if key.startswith("embedding") else "output.weight"
                    table = torch.cat((logical(has_all)[name], torch.zeros(rows - VOCAB, HIDDEN)))
                    value = table[first : first + rows // tp]
                assert torch.equal(found, value), key


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "squared_relu"])
def test_activations_keep_their_meaning(activation: str) -> None:
    model = config_of(
        ModelConfig(num_layers=1, hidden_size=4, num_attention_heads=2, vocab_size=5, activation=activation)
    )
    arguments = write_arguments(model.model)
    assert read_arguments(arguments, 5).activation == activation
    if activation == "gelu":
        # Their fused kernel computes the approximation.
        assert read_arguments(arguments | {"bias_gelu_fusion": True}, 5).activation == "gelu_tanh"
        assert read_arguments(arguments | {"bias_gelu_fusion": True, "add_bias_linear": False}, 5).activation == "gelu"


def test_tied_weights_have_a_copy_on_the_last_stage(tmp_path: Path) -> None:
    config = folders.LLAMA_CONFIG | {"tie_word_embeddings": True}
    tensors = folders.make_tensors(folders.llama_shapes())
    del tensors["lm_head.weight"]
    theirs = folders.write(tmp_path / "theirs", config, tensors)
    with open_folder(theirs) as weights:
        write_torch_folder(tmp_path / "one", weights, ParallelConfig())
        write_torch_folder(tmp_path / "two", weights, ParallelConfig(pipeline_model_parallel_size=2))
        file = "release/mp_rank_00/model_optim_rng.pt"
        assert "output_layer.weight" not in torch.load(tmp_path / "one" / file, weights_only=False)["model"]
        first, last = (
            torch.load(tmp_path / "two" / file.replace("_00", f"_00_00{stage}"), weights_only=False)["model"]
            for stage in (0, 1)
        )
        assert torch.equal(first["embedding.word_embeddings.weight"], last["output_layer.weight"])
        for name in ("one", "two"):
            with opened(tmp_path / name) as again:
                assert again.config.model.tie_embeddings
                assert not list(compare(weights, again))


def write_distributed(root: Path, is_stacked: bool, boxes: bool) -> Path:
    """A folder of the `torch_dist` format, written by torch, or in boxes of two tensor and two pipeline ranks.

    The latter has the arguments among its objects, as newer versions do.
    """
    tensors = logical(has_all=True)
    layers = [layer_of(tensors, layer, 0, 1, True) for layer in range(LAYERS)]
    whole: dict[str, Any] = {
        "embedding.word_embeddings.weight": padded(tensors["embedding.word.weight"]),
        "embedding.position_embeddings.weight": tensors["embedding.position.weight"],
        "decoder.final_layernorm.weight": tensors["decoder.final_norm.weight"],
        "decoder.final_layernorm.bias": tensors["decoder.final_norm.bias"],
        "output_layer.weight": padded(tensors["output.weight"]),
        "optimizer.state.exp_avg.output_layer.weight": torch.zeros(2),
    }
    for name in layers[0]:
        if not name.endswith("_extra_state"):
            if is_stacked:
                whole[f"decoder.layers.{name}"] = torch.stack([layer[name] for layer in layers])
            else:
                whole |= {f"decoder.layers.{number}.{name}": layer[name] for number, layer in enumerate(layers)}
    folder = root / "iter_0000003"
    folder.mkdir(parents=True)
    common = {"args": argparse.Namespace(**WITH_ALL), "iteration": 3, "checkpoint_version": 3.0}
    if boxes:
        state = torch.zeros(3, dtype=torch.uint8)
        objects = {"common_state/shard_0_1": common, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4": state}
        _write_boxes(folder, whole, objects)
    else:
        save(whole, storage_writer=FileSystemWriter(folder), no_dist=True)
        torch.save(common, folder / "common.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("3")
    return root


def _write_boxes(folder: Path, whole: dict[str, torch.Tensor], objects: dict[str, Any]) -> None:
    entries: dict[str, Any] = {name: BytesStorageMetadata() for name in objects}
    places = {}
    with open(folder / "__0_0.distcp", "wb") as file:
        for name, value in objects.items():
            begin = file.tell()
            torch.save(value, file)
            places[MetadataIndex(name)] = _StorageInfo("__0_0.distcp", begin, file.tell() - begin)
        for name, tensor in whole.items():
            chunks = []
            for part in _parts(tensor, 0 if tensor.dim() < 3 else 1):
                offset = tuple(span.start for span in part)
                chunks.append(
                    ChunkStorageMetadata(torch.Size(offset), torch.Size([span.stop - span.start for span in part]))
                )
                begin = file.tell()
                torch.save(tensor[part].clone(), file)
                places[MetadataIndex(name, torch.Size(offset))] = _StorageInfo(
                    "__0_0.distcp", begin, file.tell() - begin
                )
            properties = TensorProperties(dtype=tensor.dtype)
            entries[name] = TensorStorageMetadata(properties, tensor.size(), chunks)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(Metadata(entries, storage_data=places), file)


def _parts(tensor: torch.Tensor, cut: int) -> Iterator[tuple[slice, ...]]:
    """Two halves along each of the dims that ranks may cut."""
    spans = [[slice(0, size)] for size in tensor.shape]
    for dim in {0, cut, tensor.dim() - 1}:
        if tensor.shape[dim] % 2 == 0:
            half = tensor.shape[dim] // 2
            spans[dim] = [slice(0, half), slice(half, 2 * half)]
    stack: list[tuple[slice, ...]] = [()]
    for choices in spans:
        stack = [(*chosen, span) for chosen in stack for span in choices]
    yield from stack


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(("is_stacked", "boxes"), [(True, False), (False, False), (True, True), (False, True)])
def test_a_distributed_folder_is_read(tmp_path: Path, is_stacked: bool, boxes: bool) -> None:
    with opened(write_distributed(tmp_path, is_stacked, boxes)) as weights:
        assert weights.iteration == 3
        assert_is_the_model(weights, has_all=True)


class _Foreign:
    def __reduce__(self) -> Any:
        return os.system, ("touch harm",)


def lose_a_rank(root: Path) -> None:
    (root / "iter_0000005" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    (root / "iter_0000005" / "mp_rank_01_000").rmdir()


def change(**changes: Any) -> Any:
    """Changes what the first rank's file holds; None removes."""

    def act(root: Path) -> None:
        path = root / "iter_0000005" / "mp_rank_00_000" / "model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        for name, value in changes.items():
            if isinstance(value, dict):
                content[name] |= value
                content[name] = {key: entry for key, entry in content[name].items() if entry is not None}
            else:
                content[name] = value
        torch.save(content, path)

    return act


def cut_short(root: Path) -> None:
    path = root / "iter_0000005" / "mp_rank_00_000" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-100])


def ask_for_a_later_zip(root: Path) -> None:
    path = root / "iter_0000005" / "mp_rank_00_000" / "model_optim_rng.pt"
    content = bytearray(path.read_bytes())
    # In the archive's directory, the version that a reader needs.
    content[content.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(content)


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
BAD_FOLDERS = [
    (lose_a_rank, {}, r"lacks mp_rank_01_000, one of 2 tensor and 2 pipeline ranks"),
    (change(rng_state=_Foreign()), {}, r"it names posix\.system, which is no type that files of this kind hold"),
    (change(model={QKV: None}), {}, r"linear_qkv\.weight of shape \[8, 8\] is missing on stage 0"),
    (change(model={QKV: torch.zeros(7, 8)}), {}, r"linear_qkv\.weight has shape \[7, 8\], not \[8, 8\]"),
    (change(model={"decoder.extra": torch.zeros(2)}), {}, r"decoder\.extra of shape \[2\] is not of this model"),
    (change(model={"language_model": {"a": 1}}), {}, r"language_model in .* is no tensor of weights"),
    (change(args=None), {}, r"there are no args in it"),
    (change(model=[1, 2]), {}, r"model of rank 0, 0 in .* is no dictionary of tensors"),
    (change(model={5: torch.zeros(2)}), {}, r"5 in .* is no tensor of weights"),
    (ask_for_a_later_zip, {}, r"is not a file of torch's that can be trusted: zip file version 9\.9"),
    (cut_short, {}, r"is not a whole archive of torch's"),
    (None, {"num_experts": 8}, r"num_experts = 8 \(a mixture of experts\)"),
    (None, {"position_embedding_type": "yarn"}, r"position_embedding_type = 'yarn'"),
    (None, {"num_layers": 6}, r"holds 4 layers, but its arguments say 6"),
    (None, {"num_query_groups": None}, r"the checkpoint's arguments lack num_query_groups"),
    (None, {"window_size": 5}, r"window_size takes .*, not 5"),
    (None, {"vocab_size": "x"}, r"the checkpoint's arguments say that vocab_size is 'x', which is no number"),
    (None, {"vocab_size": 17}, r"a vocabulary of 17 is larger than the 16 rows of the embedding"),
]


@pytest.mark.parametrize(("act", "arguments", "message"), BAD_FOLDERS, ids=[message for _, _, message in BAD_FOLDERS])
def test_a_bad_folder_is_answered_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Any, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_torch(tmp_path / "bad", 2, 2, 1, True, **arguments)
    if act is not None:
        act(root)
    with pytest.raises(ValueError, match=message) as raised, opened(root):
        pass
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "harm").exists()


def test_lists_of_lists_of_one_list_take_no_time(tmp_path: Path) -> None:
    root = write_torch(tmp_path, 1, 1, 1, True)
    path = root / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["rng_state"] = []
    for _ in range(60):
        content["rng_state"] = [content["rng_state"], content["rng_state"]]
    torch.save(content, path)
    with opened(root) as weights:
        assert_is_the_model(weights)


def test_what_megatron_lacks_is_refused_by_name(tmp_path: Path) -> None:
    from dataclasses import replace

    with opened(write_torch(tmp_path / "source", 1, 1, 1, False)) as weights:
        model = replace(weights.config.model, parallel_residual=True, activation="geglu")
        changed = replace(weights, config=replace(weights.config, model=model))
        with pytest.raises(ValueError, match=r"does not have this model's parallel_residual True, activation 'geglu'"):
            write_torch_folder(tmp_path / "new", changed, ParallelConfig())
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no Megatron checkpoint: neither latest_checkpointed_iteration\.txt"):
        find_iteration(tmp_path, None)
    root = write_torch(tmp_path / "root", 1, 1, 1, False)
    with pytest.raises(ValueError, match=r"iter_0000009 is not there, but iter_0000005"):
        find_iteration(root, 9)
    assert find_iteration(root / "iter_0000005", None) == root / "iter_0000005"
