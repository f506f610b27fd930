"""The executor: every schedule does the same arithmetic in the same order, evaluation is the forward half of training,
and what goes wrong on one rank ends the job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megallm.mesh import Mesh, MeshShape
from megallm.pipeline.executor import PipelineExecutor
from megallm.schedule import build_schedule, lower
from megallm.train.step import evaluate_step, train_step
from tests.distributed.parity import (
    GPT,
    LLAMA,
    Case,
    Outcome,
    assemble,
    global_batch,
    make_engine,
    micro_batches,
    run_case,
)
from tests.distributed.parity_cases import DROPOUT, GPIPE, TWO_STAGES
from tests.distributed.pool import WorkerPool

CPU = torch.device("cpu")


def batch_of(size: int) -> dict[str, Any]:
    return {"training.global_batch_size": size}


def run_steps(pool: WorkerPool, num_micro_batches: int, pp: int, layout: dict[str, Any]) -> list[Outcome]:
    features = LLAMA | DROPOUT | batch_of(num_micro_batches)
    return pool.run(pp, run_case, Case("", features, pp=pp, layout=layout, num_steps=2))


@pytest.mark.parametrize(
    ("num_micro_batches", "pp", "layouts"),
    [
        (1, 2, [{}, GPIPE, TWO_STAGES]),
        (2, 2, [{}, GPIPE, TWO_STAGES]),
        (5, 2, [{}, GPIPE, TWO_STAGES]),
        (3, 4, [{}, GPIPE]),
    ],
    ids=["fewer than stages", "as many as ranks", "odd number", "three in four"],
)
def test_schedules_compute_the_same_bits(
    pool: WorkerPool, num_micro_batches: int, pp: int, layouts: list[dict[str, Any]]
) -> None:
    """Without tensor parallelism every number is the sum of the same terms in the same order as in one process."""
    wanted = run_steps(pool, num_micro_batches, 1, {})
    for layout in layouts:
        got = run_steps(pool, num_micro_batches, pp, layout)
        for outcome in got:
            assert outcome.losses == wanted[0].losses
        gradients, wanted_gradients = assemble(got, "gradients"), assemble(wanted, "gradients")
        assert gradients.keys() == wanted_gradients.keys()
        for name, gradient in gradients.items():
            assert np.array_equal(gradient, wanted_gradients[name]), f"{name} under {layout or '1f1b'}"


# Evaluation


def evaluate_and_train(rank: int, case: Case) -> tuple[list[float], list[float], bool]:
    """Losses of two evaluations of a batch, then of training on it twice; whether evaluating left all as it was."""
    engine = make_engine(rank, case)
    assert engine.config.training.global_batch_size and engine.config.model.vocab_size
    whole = global_batch(0, engine.config.training.global_batch_size, 16, engine.config.model.vocab_size, case.mask)
    batch = micro_batches(engine, whole)
    before = [bucket.weights.clone() for bucket in engine.reducer.buckets]
    evaluated = []
    for _ in range(2):
        sums, counts = evaluate_step(engine, batch)
        evaluated.append(float(sums / counts))
    unchanged = all(
        torch.equal(weights, bucket.weights) and not bucket.gradient.any()
        for weights, bucket in zip(before, engine.reducer.buckets, strict=True)
    )
    trained = [float(train_step(engine, batch).losses) for _ in range(2)]
    engine.mesh.close()
    return evaluated, trained, unchanged


@pytest.mark.parametrize(
    ("pp", "dp", "layout"), [(1, 1, {}), (2, 1, {}), (2, 1, TWO_STAGES)], ids=["one process", "1f1b", "interleaved"]
)
@pytest.mark.parametrize("dropout", [False, True])
def test_evaluation_is_the_forward_half_of_training(
    pool: WorkerPool, pp: int, dp: int, layout: dict[str, Any], dropout: bool
) -> None:
    case = Case("", GPT | (DROPOUT if dropout else {}) | batch_of(4), pp=pp, dp=dp, layout=layout, mask="full")
    for evaluated, trained, unchanged in pool.run(case.world_size, evaluate_and_train, case):
        assert unchanged
        assert evaluated[0] == evaluated[1]
        assert (evaluated[0] == trained[0]) is not dropout
        assert trained[1] < trained[0] or dropout


# What goes wrong


def connect(rank: int, messages: list[list[tuple[tuple[int, ...], torch.dtype]]]) -> str:
    """What an executor says when its rank expects the message of its own."""
    mesh = Mesh(MeshShape(pp=len(messages)), rank, CPU)
    try:
        PipelineExecutor({rank: lambda inputs, batch, step: inputs}, mesh, messages[rank])
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([((4, 1, 8), torch.float32)], [((4, 2, 8), torch.float32)]),
        ([((4, 1, 8), torch.float32)], [((4, 1, 8), torch.float64)]),
        ([((4, 1, 8), torch.float32)], [((4, 8), torch.float32)]),
        ([((4, 1, 8), torch.float32)], [((4, 1, 8), torch.float32)] * 2),
    ],
    ids=["size", "dtype", "dims", "number of tensors"],
)
def test_neighbours_that_expect_different_messages_are_stopped(pool: WorkerPool, first: Any, second: Any) -> None:
    answers = pool.run(2, connect, [first, second])
    assert all("expect messages of different shapes" in answer for answer in answers)
    assert pool.run(2, connect, [first, first]) == ["", ""]


def test_shape_of_the_number_of_micro_batches_is_checked() -> None:
    executor = PipelineExecutor({0: lambda inputs, batch, step: inputs}, Mesh(MeshShape(), 0, CPU), [])
    with pytest.raises(AssertionError, match="another number of micro-batches"):
        executor.run(lower(build_schedule("1f1b", 1, 1, 2)), [{}], lambda outputs, batch: outputs[0])


def run_failing_stage(rank: int) -> str:
    """Two stages, of which the second gives up on its second micro-batch."""
    mesh = Mesh(MeshShape(pp=2), rank, CPU)
    weight = torch.ones((), requires_grad=True)

    def stage(inputs: tuple[torch.Tensor, ...], batch: dict[str, torch.Tensor], step: Any) -> tuple[torch.Tensor, ...]:
        if rank == 1 and int(batch["number"]) == 1:
            raise ValueError("the second stage gives up")
        return ((inputs[0] if inputs else torch.ones(3)) * weight,)

    executor = PipelineExecutor({rank: stage}, mesh, [((3,), torch.float32)])
    batches = [{"number": torch.tensor(number)} for number in range(4)]
    try:
        executor.run(lower(build_schedule("1f1b", 2, 1, 4)), batches, lambda outputs, batch: outputs[0].sum())
    except RuntimeError:
        # The other end of the channel has gone. It speaks first.
        time.sleep(20.0)
        raise
    return "came to its end"


@pytest.fixture
def own_pool() -> Iterator[WorkerPool]:
    """Two workers that may be lost."""
    workers = WorkerPool(2)
    yield workers
    workers.close()


def test_a_stage_that_fails_ends_the_job_with_its_words(own_pool: WorkerPool) -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*the second stage gives up"):
        own_pool.run(2, run_failing_stage, timeout=300.0)
    assert time.monotonic() - begin < 200.0, "the neighbour's wait must not hold up the report"
    # New workers take the place of those that were lost.
    assert own_pool.run(2, connect, [[((2,), torch.float32)]] * 2) == ["", ""]
