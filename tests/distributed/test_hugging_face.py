"""Hugging Face models go on training over eight processes, and what they save is the same model for transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megallm.checkpoint.commit import checkpoint_folder
from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.config.tree import Config
from megallm.convert.native import open_native
from megallm.convert.verify import judge, our_logits, their_logits
from megallm.mesh import Hosts, Mesh, MeshShape
from megallm.train.engine import build_engine
from megallm.train.hugging_face import begin_with, check_export, export, with_hugging_face_model
from megallm.train.saving import save_engine
from megallm.train.step import train_step
from megallm.train.stopping import NOTHING
from megallm.train.tasks.gpt import GPTTask
from tests.distributed.parity import global_batch, micro_batches
from tests.distributed.pool import WorkerPool
from tests.distributed.transformers_weights import MODELS, SEQUENCE_LENGTH, VOCAB_SIZE, build_model
from tests.unit.convert import folders

TOKENS = torch.arange(17) * 7 % VOCAB_SIZE
SHAPE = MeshShape(tp=2, pp=2, dp=2)


def run_on(rank: int, root: Path) -> None:
    """A step from every model in `root / NAME / "theirs"`; leaves beside it a checkpoint and a Hugging Face folder."""
    mesh = Mesh(SHAPE, rank, torch.device("cpu"))
    hosts = Hosts(mesh.world, mesh.device)
    for name, model in MODELS.items():
        place = root / name
        settings = model.settings | {
            "parallel.tensor_model_parallel_size": SHAPE.tp,
            "parallel.pipeline_model_parallel_size": SHAPE.pp,
            "parallel.use_distributed_optimizer": True,
            "training.micro_batch_size": 2,
            "training.global_batch_size": 8,
            "training.train_iters": 1,
            "training.fp64": True,
            "optimizer.lr": 1e-2,
            "checkpoint.save_hf": str(place / "hf"),
        }
        config = resolve(build(settings), SHAPE.world_size)
        check_export(config)
        engine = build_engine(config, GPTTask.from_config(config), mesh)
        begin_with(engine, str(place / "theirs"))
        train_step(engine, micro_batches(engine, global_batch(0, 8, SEQUENCE_LENGTH, VOCAB_SIZE, "full")))
        saved = save_engine(engine, str(place))
        assert export(engine, hosts, saved.folder, lambda: NOTHING) == (place / "hf" / "iter_0000001", NOTHING)


@pytest.fixture(scope="module")
def trained(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `run_on` leaves of every family."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("families")
    for name in MODELS:
        build_model(name, torch.float64).save_pretrained(root / name / "theirs")
    pool.run(SHAPE.world_size, run_on, root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_eight_processes_trained_is_the_same_for_transformers(trained: Path, name: str) -> None:
    folder = trained / name / "hf" / "iter_0000001"
    model = build_model(name, torch.float64)
    before = model(input_ids=TOKENS.unsqueeze(0), use_cache=False).logits[0].detach()
    tensors = load_file(folder / "model.safetensors")
    in_memory = {key.replace("embed_out.", "lm_head."): tensor for key, tensor in tensors.items()}
    assert not model.load_state_dict(in_memory, strict=False).unexpected_keys
    after = model(input_ids=TOKENS.unsqueeze(0), use_cache=False).logits[0].detach()
    assert judge(before, after, TOKENS).share > 1e-2, "the model is meant to have moved"
    with open_native(checkpoint_folder(trained / name, 1)) as weights:
        assert judge(after, our_logits(weights, TOKENS, torch.float64), TOKENS).share < 1e-10
        # In float32 transformers computes with its own norms and angles.
        assert judge(their_logits(folder, TOKENS), our_logits(weights, TOKENS), TOKENS).share < 1e-5


def test_the_model_comes_from_the_folder(tmp_path: Path) -> None:
    tensors = folders.make_tensors(folders.llama_shapes())
    folder = folders.write(tmp_path / "theirs", folders.LLAMA_CONFIG, tensors)
    given = {"checkpoint.load_hf": str(folder), "model.hidden_dropout": 0.1, "model.num_layers": folders.LAYERS}
    config = with_hugging_face_model(build(given))
    assert config.model.num_layers == folders.LAYERS and config.model.activation == "swiglu"
    assert config.model.group_query_attention and config.model.num_query_groups == folders.GROUPS
    assert config.model.hidden_dropout == 0.1
    assert config.data.tokenizer_type is None
    (folder / "tokenizer.json").write_text("{}")
    assert with_hugging_face_model(build(given)).data.tokenizer_model == str(folder)
    with pytest.raises(ValueError, match=r"num_layers is 2 there and 5 here; rotary_base") as raised:
        with_hugging_face_model(build(given | {"model.num_layers": 5, "model.rotary_base": 3.0}))
    assert "rotary_base is 500000.0 there and 3.0 here; leave the model's flags out" in str(raised.value)


def test_a_model_that_cannot_be_exported_ends_the_run_before_its_first_step() -> None:
    config = Config(model=build(MODELS["llama"].settings | {"model.activation": "squared_relu"}).model)
    with pytest.raises(ValueError, match="no architecture of Hugging Face"):
        check_export(config)
