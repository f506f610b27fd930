"""What a run predicts of itself is what it measures: memory to a few bytes; a table at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from megallm.data_parallel.buckets import ALIGNMENT
from megallm.ops.library import NATIVE
from megallm.train.metrics import Reporter
from megallm.train.prediction import Prediction, _bytes, _state
from megallm.train.step import train_step
from tests.distributed.parity import GPT, LLAMA, Case, global_batch, make_engine, micro_batches
from tests.distributed.parity_cases import DROPOUT, FULL, GPIPE, IN_CHUNKS, SELECTIVE, SHARDED, TWO_STAGES
from tests.distributed.pool import WorkerPool

CASES = [
    Case("llama, interleaved, sharded", LLAMA, pp=2, layout=TWO_STAGES | SHARDED),
    Case("gpt, both dropouts, full recompute", GPT | DROPOUT, layout=FULL),
    Case("gpt, gpipe, selective, loss in chunks", GPT | DROPOUT, pp=2, layout=GPIPE | SELECTIVE | IN_CHUNKS),
    Case("gpt, gradient descent with momentum", GPT | {"optimizer.optimizer": "sgd"}),
    Case("llama, tensor 2, data 2, sharded", LLAMA, tp=2, dp=2, layout=SHARDED),
    Case(
        "llama in bfloat16, tensor 2, pipeline 2", LLAMA | {"training.fp64": False, "training.bf16": True}, tp=2, pp=2
    ),
]


@dataclass
class Bytes:
    """Of one rank: all, of these what the optimizer keeps, and the most that alignment may add to that."""

    predicted: float
    measured: float
    predicted_state: int
    measured_state: int
    padding: int


def predict_and_measure(rank: int, case: Case) -> tuple[Bytes, str | None]:
    """Three steps, and the table."""
    engine = make_engine(rank, case)
    reporter = Reporter(engine.config, case.world_size, False, ("lm_loss",))
    prediction = Prediction(engine)
    for step in range(3):
        batch = micro_batches(engine, global_batch(step, 8, 16, 50, "full"))
        with prediction.watching(step + 1, batch, None) as stopwatch:
            reporter.step(step + 1, 8 * (step + 1), train_step(engine, batch, stopwatch))
            assert (stopwatch is not None) == (step == 1), "the second step is the one that is watched"
    watched = prediction._watched
    assert watched is not None
    kept = sum(prediction.memory[kind] for kind in ("weights", "gradients", "master weights", "moments"))
    # A weight, its gradient and three more of each, of 8 bytes at most.
    padding = sum((len(it.members) + it.group.size) * ALIGNMENT * 5 * 8 for it in engine.reducer.buckets)
    found = Bytes(prediction.bytes, watched.bytes, kept, _bytes(_state(engine)), padding)
    return found, prediction.comparison(reporter)


@pytest.mark.skipif(not NATIVE.in_use, reason="the formula is that of the native operators")
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case is CASES[0] else pytest.mark.slow) for case in CASES]
)
def test_predicted_bytes_are_there(pool: WorkerPool, case: Case) -> None:
    ranks = pool.run(case.world_size, predict_and_measure, case)
    for it, table in ranks:
        # Besides: numbers of the samples, a few scalars.
        beside_the_state = (it.measured - it.measured_state) - (it.predicted - it.predicted_state)
        assert 0 <= beside_the_state <= 1500, it
        assert abs(it.measured_state - it.predicted_state) <= it.padding < it.measured_state / 2, it
        assert table is not None
        assert table.startswith("predicted and measured")
        assert "step time" in table and "memory (tensors)" in table
        assert ("bubble" in table) == (case.pp > 1)


def test_a_run_that_ends_before_the_watched_step_says_nothing(pool: WorkerPool) -> None:
    assert pool.run(1, _one_step) == [None]


def _one_step(rank: int) -> str | None:
    engine = make_engine(rank, Case("one step", LLAMA))
    prediction = Prediction(engine)
    batch = micro_batches(engine, global_batch(0, 8, 16, 50, "full"))
    with prediction.watching(1, batch, None) as stopwatch:
        assert stopwatch is None
        train_step(engine, batch)
    assert math.isfinite(prediction.step.total)
    return prediction.comparison(Reporter(engine.config, 1, False, ("lm_loss",)))
