"""Two runs give the same bits: losses, norms, gradients and weights, on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.parity import GPT, LLAMA, Case, run_case
from tests.distributed.parity_cases import DROPOUT, OVERLAPPED, OVERLAPPED_ALL_REDUCE, TWO_STAGES
from tests.distributed.pool import WorkerPool

SINGLE_PRECISION = {"training.fp64": False}
NUM_STEPS = 5
CASES = [
    Case("one process", GPT | DROPOUT, layout=SINGLE_PRECISION, num_steps=NUM_STEPS),
    Case("tensor 2, data 2", LLAMA | DROPOUT, tp=2, dp=2, layout=SINGLE_PRECISION | OVERLAPPED, num_steps=NUM_STEPS),
    Case(
        "interleaved 2, data 2, delayed",
        GPT | DROPOUT,
        pp=2,
        dp=2,
        layout=SINGLE_PRECISION | OVERLAPPED_ALL_REDUCE | TWO_STAGES,
        delayed=True,
        num_steps=NUM_STEPS,
    ),
    Case(
        "all axes",
        GPT | DROPOUT,
        tp=2,
        pp=2,
        dp=2,
        layout=SINGLE_PRECISION | OVERLAPPED | TWO_STAGES,
        num_steps=NUM_STEPS,
    ),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.world_size > 1 else ()) for case in CASES],
)
def test_two_runs_give_the_same_bits(pool: WorkerPool, case: Case) -> None:
    first, second = (pool.run(case.world_size, run_case, case) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.losses == other.losses
        assert one.grad_norms == other.grad_norms
        for what in ("initial_weights", "gradients", "weights"):
            for (name, *place, values, _), (*_, again, _) in zip(getattr(one, what), getattr(other, what), strict=True):
                assert np.array_equal(values.view(np.uint8), again.view(np.uint8)), (
                    f"{what} of {name} at {place} differ"
                )
