"""What a run tells of its steps on request: norms, zeros, times of parts, profiles, the file of progress."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.train.step import train_step
from tests.distributed.launch import TINY, python, read_lines, succeeded, torchrun, without
from tests.distributed.parity import LLAMA, Case, global_batch, make_engine, micro_batches
from tests.distributed.parity_cases import ODD_VOCABULARY, SEVEN_LAYERS, SHARDED
from tests.distributed.pool import WorkerPool

MODEL = LLAMA | ODD_VOCABULARY | {"logging.log_num_zeros_in_grad": True, "logging.log_params_norm": True}


def count(rank: int, case: Case) -> tuple[float, float]:
    """Zeros and norm of a step on few tokens, so that many rows of the embedding get no gradient."""
    engine = make_engine(rank, case)
    batch = global_batch(0, 8, engine.config.data.seq_length, 51, "ragged")
    batch["tokens"] %= 7
    metrics = train_step(engine, micro_batches(engine, batch))
    engine.mesh.close()
    return float(metrics.more["num_zeros"]), float(metrics.more["params_norm"])


def test_zeros_and_norm_are_those_of_one_process(pool: WorkerPool) -> None:
    ((zeros, norm),) = pool.run(1, count, Case("one", MODEL))
    # 44 of 51 rows, 32 wide, were not looked up; whatever else is zero is more.
    assert zeros >= 44 * 32
    for layout in (
        Case("tensor", MODEL, tp=2),
        Case("data", MODEL, dp=2, layout=SHARDED),
        Case("pipeline", MODEL, pp=2, layout=SEVEN_LAYERS | {"model.num_layers": 4}),
    ):
        for other_zeros, other_norm in pool.run(2, count, layout):
            assert other_zeros == zeros, layout.name
            assert other_norm == pytest.approx(norm, rel=1e-12)


def _events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


@pytest.mark.slow
def test_a_run_in_one_process_with_everything_asked_for(tmp_path: Path) -> None:
    flags = [
        *without(TINY, "--fp64", "--eval-interval", "--eval-iters"),
        *("--save", str(tmp_path), "--save-interval", "3", "--log-progress"),
        *("--metrics-jsonl", str(tmp_path / "metrics.jsonl")),
        *("--timing-log-level", "2", "--timing-log-option", "max", "--log-timers-to-tensorboard"),
        *("--log-params-norm", "--log-num-zeros-in-grad", "--decoupled-lr", "2e-2"),
        *("--profile", "--profile-step-start", "2", "--profile-step-end", "4", "--use-pytorch-profiler"),
    ]
    output = succeeded(python("pretrain_gpt.py", *flags)).output
    times = re.findall(r"> iteration (\d+), max time across ranks \(ms\):\n((?:    .*\n)+)", output)
    assert [iteration for iteration, _ in times] == ["2", "4", "6"]
    for _, lines in times:
        by_name = {name: float(value) for name, value in re.findall(r"    ([a-z-]+)\.+: ([0-9.]+)", lines)}
        passes = by_name["forward-compute"] + by_name["backward-compute"]
        assert 0 < passes <= by_name["forward-backward"]
        assert by_name["optimizer"] > 0
    lines = read_lines(tmp_path / "metrics.jsonl")
    steps = [line for line in lines if "lm_loss" in line]
    assert all(line["params_norm"] > 0 and line["num_zeros"] >= 0 for line in steps)
    # Warm-up of two steps: the second one has half of each peak.
    assert steps[1]["decoupled_learning_rate"] == pytest.approx(2 * steps[1]["learning_rate"])
    assert [line["iteration"] for line in lines if "optimizer-time" in line] == [2, 4, 6]
    names = {event.get("name") for event in _events(tmp_path / "profile.steps3-4.rank0.json.gz")}
    assert {"forward-backward", "optimizer", "0F0", "0B3"} <= names
    progress = (tmp_path / "progress.txt").read_text().splitlines()
    assert [line.split("\t")[3:5] for line in progress] == [
        ["Starting job", "Iteration: 0"],
        ["Saved checkpoint", "Iteration: 3"],
        ["Saved checkpoint", "Iteration: 6"],
    ]


@pytest.mark.slow
def test_chosen_ranks_are_profiled_and_times_come_from_all(tmp_path: Path) -> None:
    flags = [
        *without(TINY, "--eval-interval", "--eval-iters"),
        *("--tensorboard-dir", str(tmp_path), "--timing-log-level", "1", "--timing-log-option", "all"),
        *("--profile", "--profile-step-start", "4", "--profile-step-end", "40", "--profile-ranks", "1"),
        *("--tensor-model-parallel-size", "2"),
    ]
    output = succeeded(torchrun(2, "pretrain_gpt.py", *flags)).output
    assert output.count("       rank  1: ") == 3 * 4
    # The run ends before the last step that is to be profiled: what was seen is kept.
    assert [file.name for file in tmp_path.glob("profile*")] == ["profile.steps5-40.rank1.json.gz"]
    assert "optimizer" in {event.get("name") for event in _events(tmp_path / "profile.steps5-40.rank1.json.gz")}


def test_memory_of_a_process_is_told_without_a_gpu() -> None:
    from megallm.device import memory_in_bytes

    assert memory_in_bytes(torch.device("cpu"))["mem-max-resident-bytes"] > 50 * 2**20
