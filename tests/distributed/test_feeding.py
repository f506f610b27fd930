"""Runs whose batch grows, whose data cycles or is read ahead: the same losses in every layout, whole or resumed."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.mesh import Mesh, MeshShape
from megallm.train.datasets import build_datasets
from megallm.train.loop import _run
from megallm.train.tasks.gpt import GPTTask
from tests.distributed.launch import series
from tests.distributed.pool import WorkerPool

BASE = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.vocab_size": 51,
    "model.hidden_dropout": 0.1,
    "data.mock_data": True,
    "data.tokenizer_type": "NullTokenizer",
    "data.seq_length": 16,
    "training.micro_batch_size": 1,
    "training.fp64": True,
    "training.device": "cpu",
    "training.eval_interval": 4,
    "training.eval_iters": 2,
    "optimizer.lr": 1e-2,
    "optimizer.lr_decay_style": "cosine",
}
RAMP = BASE | {
    "training.rampup_batch_size": ["4", "4", "27"],
    "training.global_batch_size": 16,
    "training.train_samples": 110,
    "optimizer.lr_warmup_samples": 20,
}
STAIRS = BASE | {
    "training.step_batch_size_schedule": "0:8 300:12 1K:4",
    "training.train_iters": 10,
    "optimizer.lr_warmup_iters": 3,
}
# 48 samples, which every batch divides.
CYCLIC = BASE | {
    "training.global_batch_size": 8,
    "training.train_iters": 6,
    "data.dataloader_type": "cyclic",
    "data.data_sharding": False,
}
TP, PP, VIRTUAL = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.num_virtual_stages_per_pipeline_rank",
)
SHARDED = {"parallel.use_distributed_optimizer": True, "parallel.overlap_grad_reduce": True}
AHEAD = {"data.num_workers": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, SHARDED),
    "dp4, read ahead": (4, AHEAD),
    "dp2, two a micro-batch": (2, {"training.micro_batch_size": 2}),
    "pp2, interleaved": (2, {PP: 2, VIRTUAL: 2}),
    "tp2, dp2": (4, {TP: 2} | SHARDED),
}


def _train(rank: int, settings: dict[str, Any], world_size: int) -> None:
    config = resolve(build(settings), world_size)
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    mesh = Mesh(MeshShape(tp=tp, pp=pp, dp=world_size // (tp * pp)), rank, torch.device("cpu"))
    try:
        _run(config, GPTTask.from_config(config), mesh, build_datasets(config, None), time.monotonic())
    finally:
        mesh.close()


def train(pool: WorkerPool, metrics: Path, settings: dict[str, Any], layout: tuple[int, dict[str, Any]]) -> list[Any]:
    """What the run tells, in a file that it goes on with: its steps and evaluations."""
    world_size, changes = layout
    files = {"logging.metrics_jsonl": str(metrics)}
    pool.run(world_size, _train, settings | changes | files, world_size)
    return series(metrics)


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for name in theirs:
            if name not in ("step_time_ms", "tokens_per_second"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-12), (name, theirs["iteration"])


ALONE: tuple[int, dict[str, Any]] = (1, {})


@pytest.fixture(scope="module")
def alone(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("alone")
    runs = {"ramp": RAMP, "stairs": STAIRS, "cyclic": CYCLIC}
    return {name: train(pool, folder / name, settings, ALONE) for name, settings in runs.items()}


def test_batches_grow_as_they_are_told_to(alone: dict[str, list[Any]]) -> None:
    ramp = [line for line in alone["ramp"] if "lm_loss" in line]
    # 27 samples in three increments: from 9, 18 and 27 samples on.
    assert [line["global_batch_size"] for line in ramp] == [4, 4, 4, 8, 12, 16, 16, 16, 16]
    assert [line["consumed_samples"] for line in ramp] == [4, 8, 12, 20, 32, 48, 64, 80, 96]
    # The warm-up counts samples, and a step its own: at 4 of 20 samples, at 8, at 12.
    assert [line["learning_rate"] for line in ramp[:5]] == pytest.approx([0.0, 0.002, 0.004, 0.006, 0.01])
    stairs = [line for line in alone["stairs"] if "lm_loss" in line]
    # 300 tokens are 18 samples, a thousand are 62.
    assert [line["global_batch_size"] for line in stairs] == [8, 8, 8, 12, 12, 12, 12, 4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("ramp", layout) for layout in LAYOUTS),
        pytest.param("stairs", "pp2, interleaved", marks=pytest.mark.slow),
        pytest.param("stairs", "dp2, two a micro-batch", marks=pytest.mark.slow),
    ],
)
def test_growing_batches_in_every_layout(
    pool: WorkerPool, alone: dict[str, list[Any]], tmp_path: Path, name: str, layout: str
) -> None:
    settings = {"ramp": RAMP, "stairs": STAIRS}[name]
    assert_same(train(pool, tmp_path / "metrics", settings, LAYOUTS[layout]), alone[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "stop", "after"),
    [
        pytest.param(ALONE, 3, LAYOUTS["dp4, read ahead"], marks=pytest.mark.slow),
        (LAYOUTS["dp4, read ahead"], 4, LAYOUTS["pp2, interleaved"]),
        (LAYOUTS["dp2"], 5, ALONE),
        pytest.param(LAYOUTS["pp2, interleaved"], 2, LAYOUTS["tp2, dp2"], marks=pytest.mark.slow),
    ],
)
def test_resumed_in_the_middle_of_the_ramp(
    pool: WorkerPool, alone: dict[str, list[Any]], tmp_path: Path, before: Any, stop: int, after: Any
) -> None:
    save = {"checkpoint.save": str(tmp_path / "checkpoints")}
    train(pool, tmp_path / "metrics", RAMP | save | {"training.exit_interval": stop}, before)
    load = {"checkpoint.load": str(tmp_path / "checkpoints")}
    assert_same(train(pool, tmp_path / "metrics", RAMP | load, after), alone["ramp"])


@pytest.mark.slow
def test_a_ramp_is_resumed_where_its_early_batches_no_longer_divide(
    pool: WorkerPool, alone: dict[str, list[Any]], tmp_path: Path
) -> None:
    save = {"checkpoint.save": str(tmp_path / "checkpoints"), "training.exit_interval": 5}
    train(pool, tmp_path / "metrics", RAMP | save, ALONE)
    load = {"checkpoint.load": str(tmp_path / "checkpoints")}
    eight_at_once = (4, {"training.micro_batch_size": 4})
    assert_same(train(pool, tmp_path / "metrics", RAMP | load, eight_at_once), alone["ramp"])
    with pytest.raises(RuntimeError, match=r"a batch of 4 sequences cannot be cut into .* 4 % \(4 x 4\) = 4"):
        train(pool, tmp_path / "fresh", RAMP, eight_at_once)


def test_a_length_in_samples_holds_where_the_batch_is_changed_on_the_way(pool: WorkerPool, tmp_path: Path) -> None:
    settings = BASE | {"training.train_samples": 44, "training.global_batch_size": 4}
    save = {"checkpoint.save": str(tmp_path / "checkpoints"), "training.exit_interval": 5}
    train(pool, tmp_path / "metrics", settings | save, ALONE)
    changes = {"checkpoint.load": str(tmp_path / "checkpoints"), "training.global_batch_size": 8}
    lines = [line for line in train(pool, tmp_path / "metrics", settings | changes, ALONE) if "lm_loss" in line]
    assert [line["consumed_samples"] for line in lines] == [4, 8, 12, 16, 20, 28, 36, 44]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "dp4, read ahead", "dp2, two a micro-batch", "tp2, dp2"])
def test_cyclic_order_in_every_layout(
    pool: WorkerPool, alone: dict[str, list[Any]], tmp_path: Path, layout: str
) -> None:
    assert_same(train(pool, tmp_path / "metrics", CYCLIC, LAYOUTS[layout]), alone["cyclic"])


@pytest.mark.slow
def test_what_deals_the_data_anew_is_refused_unless_allowed(pool: WorkerPool, tmp_path: Path) -> None:
    sharded = CYCLIC | {"data.data_sharding": True}
    save = {"checkpoint.save": str(tmp_path / "checkpoints"), "training.exit_interval": 3}
    train(pool, tmp_path / "metrics", sharded | save, LAYOUTS["dp2"])
    load = {"checkpoint.load": str(tmp_path / "checkpoints")}
    sentence = "micro-batches of 1 on 2 data parallel ranks there, micro-batches of 1 on 1 data parallel rank here"
    with pytest.raises(RuntimeError, match=f"read its data in another order.*{sentence}.*--allow-data-change"):
        train(pool, tmp_path / "refused", sharded | load, ALONE)
    with pytest.raises(RuntimeError, match="seed: 1234 there, 1 here"):
        train(pool, tmp_path / "refused", sharded | load | {"training.seed": 1}, LAYOUTS["dp2"])
    allowed = {"checkpoint.allow_data_change": True}
    lines = train(pool, tmp_path / "metrics", sharded | load | allowed, ALONE)
    assert [line["iteration"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4, 5, 6]


def _collections(rank: int, settings: dict[str, Any]) -> list[int]:
    """The generations that are collected within a run."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    try:
        _train(rank, settings, 1)
    finally:
        gc.callbacks.remove(note)
    return found


def test_garbage_is_collected_at_set_times_only(pool: WorkerPool) -> None:
    # At the beginning, after step 3, around the evaluation after step 4, after step 6, around that after step 8.
    steps = BASE | {"training.train_iters": 8, "training.manual_gc": True, "training.manual_gc_interval": 3}
    (found,) = pool.run(1, _collections, steps)
    assert "2220220" in "".join(map(str, found))
