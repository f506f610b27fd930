"""A gradient that is not finite on one rank skips the step on all ranks alike, and training goes on as if the step had
not been.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from megallm.parameter import description_of
from megallm.train.engine import Engine
from megallm.train.step import train_step
from tests.distributed.parity import GPT, Case, global_batch, make_engine, micro_batches
from tests.distributed.parity_cases import CLIPPED, NO_SEQUENCE_PARALLEL, OVERLAPPED, SHARDED, TWO_PER_MICRO_BATCH
from tests.distributed.pool import WorkerPool
from tests.distributed.seeded_bugs import Bug, skip_decided_by_each_shard_alone

MODEL = GPT | CLIPPED | {"model.num_layers": 2}
PLAIN = Case("tensor, no sequence parallelism", MODEL, tp=2, layout=TWO_PER_MICRO_BATCH | NO_SEQUENCE_PARALLEL)
CASES = [
    Case("tensor", MODEL, tp=2, layout=TWO_PER_MICRO_BATCH),
    PLAIN,
    Case("pipeline", MODEL, pp=2, layout=TWO_PER_MICRO_BATCH),
    Case("data", MODEL, dp=2, layout=TWO_PER_MICRO_BATCH),
    Case("data, sharded, overlapped", MODEL, dp=2, layout=TWO_PER_MICRO_BATCH | OVERLAPPED),
    Case("tensor, data, sharded", MODEL, tp=2, dp=2, layout=TWO_PER_MICRO_BATCH | SHARDED),
]


@dataclass
class Log:
    """What one rank saw: whether each step was skipped, flat weights at the start and after each step, counters."""

    skipped: list[float]
    weights: list[np.ndarray]
    num_updates: float
    position: float


def train(rank: int, case: Case, batches: list[int], poisoned: str | None, value: float, bugs: tuple[Bug, ...]) -> Log:
    """Trains on the numbered batches. In the first step the last rank's gradient of `poisoned` gets a `value` in it."""
    with pytest.MonkeyPatch.context() as patch:
        for bug in bugs:
            bug(patch)
        engine = make_engine(rank, case)
        log = Log([], [_weights(engine)], 0.0, 0.0)
        for number in batches:
            if poisoned is not None and number == batches[0] and rank == case.world_size - 1:
                _poison_next_step(engine, poisoned, value)
            samples = global_batch(number, 8, engine.config.data.seq_length, 52, case.mask)
            metrics = train_step(engine, micro_batches(engine, samples))
            engine.reducer.finish_gather()
            log.skipped.append(float(metrics.skipped))
            log.weights.append(_weights(engine))
        log.num_updates = float(engine.progress.num_updates)
        log.position = float(engine.progress.position)
        engine.mesh.close()
        return log


def _weights(engine: Engine) -> np.ndarray:
    return np.concatenate([bucket.weights.numpy().copy() for bucket in engine.reducer.buckets])


def _poison_next_step(engine: Engine, name: str, value: float) -> None:
    """Spoils one element as soon as the buffers are cleared: what is added later leaves it spoilt."""
    start_step = engine.reducer.start_step

    def start_and_poison(num_micro_batches: int) -> None:
        start_step(num_micro_batches)
        for bucket in engine.reducer.buckets:
            for member in bucket.members:
                if description_of(member.parameter).pieces[0].name == name:
                    bucket.gradient_of(member).view(-1)[0] = value
        engine.reducer.start_step = start_step  # type: ignore[method-assign]

    engine.reducer.start_step = start_and_poison  # type: ignore[method-assign]


POISONS = [
    ("decoder.layers.1.mlp.down.weight", np.nan),
    pytest.param("decoder.final_norm.weight", np.inf, marks=pytest.mark.slow),
    pytest.param("decoder.layers.1.mlp.down.bias", np.nan, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "value"), POISONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step_is_skipped_everywhere(pool: WorkerPool, case: Case, name: str, value: float) -> None:
    logs = pool.run(case.world_size, train, case, [0, 1, 2], name, value, ())
    clean = pool.run(case.world_size, train, case, [1, 2], None, 0.0, ())
    for log, wanted in zip(logs, clean, strict=True):
        assert log.skipped == [1.0, 0.0, 0.0]
        assert np.array_equal(log.weights[0], log.weights[1])
        assert not np.array_equal(log.weights[1], log.weights[2])
        assert np.array_equal(log.weights[-1], wanted.weights[-1])
        assert (log.num_updates, log.position) == (wanted.num_updates, wanted.position) == (2.0, 16.0)


def test_skip_decided_by_each_shard_alone_is_caught(pool: WorkerPool) -> None:
    logs = pool.run(
        2, train, CASES[0], [0], "decoder.layers.1.mlp.down.weight", np.nan, (skip_decided_by_each_shard_alone,)
    )
    assert not any(np.array_equal(log.weights[0], log.weights[1]) for log in logs)
