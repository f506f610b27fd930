"""float16: the loss scale finds its way by the same steps in every layout, and goes on where a checkpoint left it. What
it multiplies and divides leaves no trace in the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallm.checkpoint.boxes import local_boxes
from megallm.optimizer.loss_scale import LossScale
from megallm.train.engine import Engine
from megallm.train.resume import load_engine
from megallm.train.saving import save_engine
from megallm.train.step import train_step
from tests.distributed.parity import GPT, LLAMA, Case, Outcome, global_batch, make_engine, micro_batches, run_case
from tests.distributed.parity_cases import CLIPPED, DROPOUT, OVERLAPPED, SHARDED, TWO_PER_MICRO_BATCH
from tests.distributed.pool import WorkerPool
from tests.distributed.seeded_bugs import (
    Bug,
    clipped_by_the_norm_of_scaled_gradients,
    loss_scale_moved_by_each_rank_alone,
    loss_scale_not_taken_out_on_the_last_rank,
)

FLOAT16 = {"training.fp64": False, "training.fp16": True}
# The largest gradients of the batch that is used again and again stay away from where they overflow: a tenth more or
# less would skip the same steps.
SCALES = {"training.initial_loss_scale": 1.1 * 2**22, "training.loss_scale_window": 4}
LAYOUT = TWO_PER_MICRO_BATCH
TWO_LAYERS = LLAMA | CLIPPED | {"model.num_layers": 2}
MODEL = TWO_LAYERS | FLOAT16 | SCALES
WITH_DROPOUT = GPT | CLIPPED | DROPOUT | FLOAT16 | SCALES | {"model.num_layers": 2}
NUM_STEPS = 18


@dataclass
class Log:
    """What one rank saw: loss, loss scale and whether it was skipped after each step; the whole state at the end."""

    losses: list[float]
    scales: list[float]
    skipped: list[int]
    state: list[Any]


def train(
    rank: int,
    case: Case,
    num_steps: int,
    bugs: tuple[Bug, ...] = (),
    load: str | None = None,
    save: tuple[str, int] | None = None,
) -> Log:
    """Trains on one batch until `num_steps` are done, from a checkpoint if there is one to `load`.

    `save` is a folder and the step after which it gets a checkpoint.
    """
    with pytest.MonkeyPatch.context() as patch:
        prepares = [bug(patch) for bug in bugs]
        engine = make_engine(rank, case)
        for prepare in filter(None, prepares):
            prepare(engine)
        if load is not None:
            assert load_engine(engine, load) is not None
        log = Log([], [], [], [])
        batch = global_batch(0, 8, engine.config.data.seq_length, 52, case.mask)
        while engine.progress.iteration < num_steps:
            metrics = train_step(engine, micro_batches(engine, batch))
            log.losses.append(float(metrics.losses[0]))
            log.scales.append(float(metrics.loss_scale))
            log.skipped.append(int(metrics.skipped))
            if save is not None and engine.progress.iteration == save[1]:
                save_engine(engine, save[0])
        engine.reducer.finish_gather()
        log.state = _state(engine)
        engine.mesh.close()
        return log


def _state(engine: Engine) -> list[Any]:
    boxes = local_boxes(engine.optimizer, engine.chunks, engine.mesh)
    tensors = [(box.key, box.tensor.numpy().tobytes()) for box in boxes]
    model = [bucket.weights.view(torch.int16).numpy().tobytes() for bucket in engine.reducer.buckets]
    return [tensors, model, engine.optimizer.loss_scale.state()]


@pytest.fixture(scope="session")
def alone(pool: WorkerPool) -> Log:
    """The model in one process."""
    return pool.run(1, train, Case("", MODEL, layout=LAYOUT), NUM_STEPS)[0]


def test_the_scale_goes_down_until_gradients_fit_and_up_again(alone: Log) -> None:
    first = alone.skipped.index(0)
    start = SCALES["training.initial_loss_scale"]
    assert first >= 2, "the case begins too low to show anything"
    assert alone.scales[:first] == [start / 2**number for number in range(first)], "the first skipped step is for free"
    assert max(alone.scales[first:]) > alone.scales[first]
    assert 1 in alone.skipped[first:], "it tries in vain to go up"
    trained = [loss for loss, skipped in zip(alone.losses, alone.skipped, strict=True) if not skipped]
    assert trained == sorted(trained, reverse=True)
    assert trained[-1] < 0.9 * trained[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("tensor", MODEL, tp=2, layout=LAYOUT),
        Case("pipeline", MODEL, pp=2, layout=LAYOUT),
        Case("data", MODEL, dp=2, layout=LAYOUT),
        Case("data, sharded, overlapped", MODEL, dp=2, layout=LAYOUT | OVERLAPPED),
        pytest.param(Case("all axes", MODEL, tp=2, pp=2, dp=2, layout=LAYOUT | SHARDED), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_layouts_take_the_same_steps(pool: WorkerPool, alone: Log, case: Case) -> None:
    for log in pool.run(case.world_size, train, case, NUM_STEPS):
        assert log.skipped == alone.skipped
        assert log.scales == alone.scales
        assert log.losses == pytest.approx(alone.losses, rel=1e-3)


@pytest.mark.slow
def test_with_attention_dropout_too(pool: WorkerPool) -> None:
    one, two = (
        pool.run(case.world_size, train, case, 12)
        for case in (Case("", WITH_DROPOUT, layout=LAYOUT), Case("", WITH_DROPOUT, pp=2, layout=LAYOUT))
    )
    assert [log.skipped for log in two] == [one[0].skipped] * 2
    assert 0 < sum(one[0].skipped) < 12
    assert two[0].losses == pytest.approx(one[0].losses, rel=1e-3)


def test_losses_are_those_of_float32(pool: WorkerPool) -> None:
    constant = TWO_LAYERS | FLOAT16 | {"training.loss_scale": 1000.0}
    single = TWO_LAYERS | {"training.fp64": False}
    half, full = (pool.run(1, train, Case("", model, layout=LAYOUT), 12)[0] for model in (constant, single))
    assert half.scales == [1000.0] * 12
    assert full.scales == [1.0] * 12
    assert half.skipped == full.skipped == [0] * 12
    assert half.losses == pytest.approx(full.losses, rel=2e-3)


def test_a_constant_scale_stays_whatever_overflows(pool: WorkerPool) -> None:
    case = Case("", TWO_LAYERS | FLOAT16 | {"training.loss_scale": 2.0**40}, layout=LAYOUT)
    (log,) = pool.run(1, train, case, 3)
    assert log.skipped == [1, 1, 1]
    assert log.scales == [2.0**40] * 3


# Checkpoints

# After step 6, two steps into a window of four and with the hysteresis used up; after step 13, which was the first to
# be skipped since the scale doubled: what was forgotten would show.
BREAKS = [
    (6, Case("data, sharded", MODEL, dp=2, layout=LAYOUT | SHARDED)),
    (13, Case("data, sharded", MODEL, dp=2, layout=LAYOUT | SHARDED)),
    (6, Case("pipeline", MODEL, pp=2, layout=LAYOUT)),
    pytest.param(6, Case("tensor", MODEL, tp=2, layout=LAYOUT), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("after", "case"), BREAKS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_resumed_run_goes_on_bit_for_bit(pool: WorkerPool, tmp_path: Path, after: int, case: Case) -> None:
    whole = pool.run(case.world_size, train, case, NUM_STEPS, (), None, (str(tmp_path), after))
    other_start = replace(case, features=case.features | {"training.initial_loss_scale": 2.0**16})
    resumed = pool.run(case.world_size, train, other_start, NUM_STEPS, (), str(tmp_path))
    for log, want in zip(resumed, whole, strict=True):
        assert log.scales == want.scales[after:]
        assert log.skipped == want.skipped[after:]
        assert 1 in log.skipped
        assert log.losses == want.losses[after:]
        assert log.state == want.state


@pytest.mark.slow
def test_another_layout_goes_on_with_the_same_scale(pool: WorkerPool, alone: Log, tmp_path: Path) -> None:
    pool.run(2, train, Case("", MODEL, dp=2, layout=LAYOUT | SHARDED), 6, (), None, (str(tmp_path), 6))
    for log in pool.run(2, train, Case("", MODEL, tp=2, layout=LAYOUT), NUM_STEPS, (), str(tmp_path)):
        assert log.scales == alone.scales[6:]
        assert log.losses == pytest.approx(alone.losses[6:], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "none", "fp16 with a constant scale"])
def test_a_checkpoint_without_a_scale_starts_with_the_first_one(tmp_path: Path, precision: str) -> None:
    constant = {"training.loss_scale": 8.0} | FLOAT16
    settings = {"bf16": {"training.fp64": False, "training.bf16": True}, "none": {"training.fp64": False}}
    saving = make_engine(0, Case("", TWO_LAYERS | settings.get(precision, constant)))
    save_engine(saving, str(tmp_path))
    engine = make_engine(0, Case("", MODEL))
    start = engine.optimizer.loss_scale.state()
    assert load_engine(engine, str(tmp_path)) is not None
    assert (
        engine.optimizer.loss_scale.state()
        == start
        == {
            "scale": 1.1 * 2**22,
            "growth_tracker": 0.0,
            "hysteresis_tracker": 2.0,
        }
    )


def test_another_precision_takes_up_a_checkpoint_of_float16(tmp_path: Path) -> None:
    save_engine(make_engine(0, Case("", MODEL)), str(tmp_path))
    engine = make_engine(0, Case("", TWO_LAYERS))
    assert load_engine(engine, str(tmp_path)) is not None
    assert float(engine.optimizer.loss_scale.value) == 1.0


# A scale that is a power of two changes no bit where nothing over- or underflows: in float64 every place that forgets
# it, or counts it twice, is seen.


def with_scale(scale: float) -> Callable[[Engine], None]:
    def prepare(engine: Engine) -> None:
        engine.optimizer.loss_scale = LossScale(scale, engine.mesh.device)

    return prepare


def run_scaled(rank: int, case: Case, scale: float, bugs: tuple[Bug, ...]) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        prepares = [with_scale(scale), *(bug(patch) for bug in bugs)]

        def prepare(engine: Engine) -> None:
            for one in filter(None, prepares):
                one(engine)

        return run_case(rank, case, prepare)


def leaves_no_trace(pool: WorkerPool, case: Case, scale: float, bugs: tuple[Bug, ...] = ()) -> bool:
    """Whether losses, norms and weights with the scale are those without, bit for bit, on each rank."""
    plain = pool.run(case.world_size, run_case, case)
    scaled = pool.run(case.world_size, run_scaled, case, scale, bugs)
    return all(
        one.losses == other.losses
        and one.grad_norms == other.grad_norms
        and all(np.array_equal(a[3], b[3]) for a, b in zip(one.weights, other.weights, strict=True))
        for one, other in zip(plain, scaled, strict=True)
    )


EXACT = [
    Case("data, sharded", GPT | CLIPPED | {"model.num_layers": 2}, dp=2, layout=LAYOUT | SHARDED, num_steps=3),
    Case("tensor", TWO_LAYERS, tp=2, layout=LAYOUT, num_steps=3),
    Case("pipeline, tied, ragged", GPT | CLIPPED, pp=2, layout=LAYOUT, mask="ragged", num_steps=3),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_a_scale_leaves_no_trace(pool: WorkerPool, case: Case) -> None:
    assert leaves_no_trace(pool, case, 2.0**20)
    assert leaves_no_trace(pool, case, 2.0**-7)


@pytest.mark.parametrize(
    "bug",
    [loss_scale_not_taken_out_on_the_last_rank, clipped_by_the_norm_of_scaled_gradients],
    ids=lambda it: it.__name__,
)
def test_a_scale_that_stays_in_the_numbers_is_caught(pool: WorkerPool, bug: Bug) -> None:
    assert leaves_no_trace(pool, EXACT[0], 1.0, (bug,)), "without a scale there is nothing to forget"
    assert not leaves_no_trace(pool, EXACT[0], 2.0**20, (bug,))


def test_a_scale_moved_by_each_rank_alone_is_caught(pool: WorkerPool, alone: Log) -> None:
    case = Case("", MODEL, pp=2, layout=LAYOUT)
    logs = pool.run(2, train, case, NUM_STEPS, (loss_scale_moved_by_each_rank_alone,))
    assert any(log.scales != alone.scales for log in logs)
