"""Two runs give the same bits: losses, norms, gradients and weights, on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megallm.config.dictionary import build
from megallm.train.processes import joined_processes
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


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("ops", [[], ["reference"]], ids=["native", "plain torch"])
def test_deterministic_mode_has_all_it_needs_and_changes_no_bit_on_a_cpu(restored: None, ops: list[str]) -> None:
    """An operator of torch that has no deterministic version would raise."""
    case = Case("", LLAMA | DROPOUT, layout=SINGLE_PRECISION | {"training.ops": ops}, num_steps=2)
    assert not torch.are_deterministic_algorithms_enabled()
    free = run_case(0, case)
    config = build(
        case.settings()
        | {
            "training.deterministic_mode": True,
            "training.train_iters": 2,
            "data.mock_data": True,
            "data.tokenizer_type": "NullTokenizer",
        }
    )
    with joined_processes(config):
        assert torch.are_deterministic_algorithms_enabled()
        held = run_case(0, case)
    assert held.losses == free.losses
    assert held.grad_norms == free.grad_norms
