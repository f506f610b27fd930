"""Interrupted anywhere and taken up again, a run is bit for bit the one that was never interrupted."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.checkpoint.load import find_checkpoints
from megallm.checkpoint.manifest import read_manifest
from megallm.config import data_parallel_size, parse_arguments, resolve
from megallm.mesh import Mesh, MeshShape
from megallm.train.loop import pretrain_on
from megallm.train.stopping import ExitCode
from megallm.train.tasks.gpt import GPTTask
from tests.distributed.launch import TINY, read_lines, training_lines, validation_lines, without
from tests.distributed.pool import WorkerPool

NUM_STEPS, BATCH = 12, 4
# Dropout is on in TINY, and a validation every three steps.
FLAGS = [
    *without(TINY, "--fp64", "--train-iters", "--global-batch-size", "--log-interval", "--num-layers", "--hidden-size"),
    *("--num-layers", "2", "--hidden-size", "16"),
    *("--train-iters", str(NUM_STEPS), "--global-batch-size", str(BATCH), "--log-interval", "1000"),
    *("--rampup-batch-size", "2", "2", "20"),
    *("--async-save", "--save-interval", "4", "--save-keep-last", "2"),
]
SERIES = ("lm_loss", "grad_norm", "learning_rate", "global_batch_size", "consumed_samples", "valid_lm_loss")


@dataclass(frozen=True)
class Layout:
    """So many processes, with these flags, that are stopped so often."""

    world_size: int
    num_stops: int
    flags: tuple[str, ...] = ()


LAYOUTS = {
    "one process": Layout(1, 26),
    "tensor 2": Layout(2, 12, ("--tensor-model-parallel-size", "2")),
    "pipeline 2 data 2 sharded": Layout(
        4, 12, ("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer", "--overlap-param-gather")
    ),
}


def run(rank: int, world_size: int, folder: str, flags: list[str], stop: tuple[int, int, float, int] | None) -> int:
    """A run in processes that are there. `stop` (rank, steps, seconds, signal): what that rank gets so many seconds
    after so many steps of this run are done.
    """
    config = resolve(parse_arguments(flags, prog="test", description=""), world_size)
    parallel = config.parallel
    shape = MeshShape(
        tp=parallel.tensor_model_parallel_size,
        dp=data_parallel_size(parallel, world_size),
        pp=parallel.pipeline_model_parallel_size,
    )
    mesh = Mesh(shape, rank, torch.device("cpu"), timedelta(seconds=60))
    # A signal that comes before the first step or after the last one is not what is looked at here.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR1)}
    ended = threading.Event()
    if stop is not None and stop[0] == rank:
        metrics = Path(folder) / "metrics.jsonl"
        threading.Thread(target=_send, args=(metrics, *stop[1:], ended), daemon=True).start()
    try:
        return pretrain_on(mesh, config, GPTTask.from_config, time.monotonic())
    finally:
        ended.set()
        mesh.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _send(metrics: Path, steps: int, seconds: float, number: int, ended: threading.Event) -> None:
    lines = _num_steps(metrics)
    while not ended.is_set() and _num_steps(metrics) < lines + steps:
        time.sleep(0.001)
    # Again and again, since one that comes before the run listens is not heard.
    while not ended.wait(seconds):
        os.kill(os.getpid(), number)
        seconds = 1.0


def _num_steps(metrics: Path) -> int:
    return metrics.read_text().count('"lm_loss"') if metrics.exists() else 0


def series(folder: Path) -> dict[tuple[str, int], Any]:
    """Every scalar by name and step; a step that was done again must have given the same."""
    found: dict[tuple[str, int], Any] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        for name in SERIES:
            if name in line:
                # The loss of a step and that of the validation after it stand in two lines.
                key = (name if "lm_loss" in line or name.startswith("valid") else f"valid {name}", line["iteration"])
                assert found.setdefault(key, line[name]) == line[name], f"{key} differs when the step is done again"
    return found


def digests(folder: Path) -> dict[str, Any]:
    """The checksums of everything that the last checkpoint holds."""
    newest = find_checkpoints(str(folder / "checkpoints"))[0]
    manifest = read_manifest(newest)
    assert manifest.iteration == NUM_STEPS
    state = manifest.state
    # Who is in a hurry saves before the evaluation, and others after it: two batches.
    validated = state["consumed_valid_samples"] + 2 * BATCH * state["evaluation_due"]
    counters = {"validated": validated, "consumed": state["consumed_samples"], "position": state["position"]}
    return counters | {
        name: sorted((box.offset, box.chunks) for box in tensor.boxes) for name, tensor in manifest.tensors.items()
    }


def start(pool: WorkerPool, layout: Layout, folder: Path, stop: tuple[int, int, float, int] | None = None) -> ExitCode:
    checkpoints = str(folder / "checkpoints")
    flags = [*FLAGS, *layout.flags, "--save", checkpoints, "--load", checkpoints]
    flags += ["--metrics-jsonl", str(folder / "metrics.jsonl")]
    codes = pool.run(layout.world_size, run, layout.world_size, str(folder), flags, stop)
    assert len(set(codes)) == 1, f"ranks end differently: {codes}"
    return ExitCode(codes[0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_stopped_by_signals_at_random_points(pool: WorkerPool, tmp_path: Path, layout: Layout) -> None:
    assert start(pool, layout, tmp_path / "whole") == ExitCode.FINISHED
    whole, final = series(tmp_path / "whole"), digests(tmp_path / "whole")
    generator = random.Random(layout.world_size)
    num_stops = chain = 0
    while num_stops < layout.num_stops:
        folder, chain = tmp_path / f"chain{chain}", chain + 1
        code = ExitCode.UNFINISHED
        while code == ExitCode.UNFINISHED:
            victim, steps = generator.randrange(layout.world_size), generator.randrange(1, 5)
            code = start(pool, layout, folder, (victim, steps, generator.uniform(0, 0.02), signal.SIGTERM))
            num_stops += code == ExitCode.UNFINISHED
        assert series(folder) == whole
        assert digests(folder) == final
        assert chain < 30, "the signals come too late"


# Long enough that nobody waits for it.
LONG_EVALUATION = ["--eval-iters", "100000", "--eval-interval", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_is_not_waited_for(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    """What the signal finds under way is an evaluation: it comes some time after the step before it."""
    layout = Layout(world_size, 0, tuple(LONG_EVALUATION))
    stop = (world_size - 1, 3, 0.5, signal.SIGTERM)
    begin = time.monotonic()
    assert start(pool, layout, tmp_path, stop) == ExitCode.UNFINISHED
    assert time.monotonic() - begin < 60, "100,000 batches take longer"
    assert training_lines(tmp_path / "metrics.jsonl")[-1]["iteration"] == 3, "without another step"
    assert not validation_lines(tmp_path / "metrics.jsonl"), "half an evaluation says nothing"
    manifest = read_manifest(find_checkpoints(str(tmp_path / "checkpoints"))[0])
    assert (manifest.iteration, manifest.state["evaluation_due"]) == (3, True)
    # The run that goes on begins with it, and is interrupted in it.
    stop = (world_size - 1, 0, 0.0, signal.SIGTERM)
    assert start(pool, layout, tmp_path, stop) == ExitCode.UNFINISHED
    assert training_lines(tmp_path / "metrics.jsonl")[-1]["iteration"] == 3


@pytest.mark.slow
def test_a_checkpoint_can_be_asked_for_in_the_middle_of_an_evaluation(pool: WorkerPool, tmp_path: Path) -> None:
    layout = Layout(1, 0, ("--eval-iters", "60", "--eval-interval", "3", "--train-iters", "4"))
    assert start(pool, layout, tmp_path / "whole") == ExitCode.FINISHED
    assert start(pool, layout, tmp_path / "asked", (0, 3, 0.05, signal.SIGUSR1)) == ExitCode.FINISHED
    assert find_checkpoints(str(tmp_path / "asked" / "checkpoints"), 3)
    assert series(tmp_path / "asked") == series(tmp_path / "whole")


@pytest.fixture
def victims() -> Iterator[WorkerPool]:
    """Workers of our own: killing one replaces all of them."""
    workers = WorkerPool(2)
    yield workers
    workers.close()


@pytest.mark.slow
def test_killed_at_random_points(victims: WorkerPool, tmp_path: Path) -> None:
    layout = LAYOUTS["tensor 2"]
    assert start(victims, layout, tmp_path / "whole") == ExitCode.FINISHED
    generator = random.Random(5)
    num_kills = 0
    for _ in range(15):
        # Later and later: on a busy machine none that is killed at once gets as far as a checkpoint.
        seconds = generator.uniform(0, 0.02 * (1 + num_kills))
        stop = (generator.randrange(2), generator.randrange(3, 6), seconds, signal.SIGKILL)
        try:
            assert start(victims, layout, tmp_path / "killed", stop) == ExitCode.FINISHED
            break
        except RuntimeError:
            num_kills += 1
    assert 2 <= num_kills < 15
    assert series(tmp_path / "killed") == series(tmp_path / "whole")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
