"""What operators write over: autograd is told, and nothing of it is differentiated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megallm.ops.accumulate import accumulate, accumulate_weight_gradient
from megallm.ops.adamw import adamw
from megallm.ops.cross_entropy import CrossEntropy, logit_gradients_, loss_statistics
from megallm.ops.embedding import accumulate_rows
from megallm.ops.library import NATIVE
from megallm.ops.sum_of_squares import sum_of_squares
from tests.unit.ops import accuracy

IMPLEMENTATIONS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not NATIVE.loaded, reason="not built"))]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def scalar(value: float) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float64)


def call_adamw(implementation: str) -> list[torch.Tensor]:
    weights, gradient, first, second = (torch.rand(5) for _ in range(4))
    updates, rounded = torch.ones(()), torch.empty(5, dtype=torch.bfloat16)
    rates = {"learning_rate": scalar(0.1), "weight_decay": scalar(0.1), "gradient_scale": scalar(1.0)}
    settings = {"skip": scalar(0.0), "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "implementation": implementation}
    adamw(weights, gradient, first, second, updates, rounded, **rates, **settings)
    return [weights, first, second, updates, rounded]


def call_accumulate(implementation: str) -> list[torch.Tensor]:
    target = torch.ones(5)
    accumulate(target, torch.ones(5), implementation=implementation)
    return [target]


def call_accumulate_weight_gradient(implementation: str) -> list[torch.Tensor]:
    targets = [torch.zeros(3, 5), torch.zeros(3, 5)]
    for target, dtype in zip(targets, (torch.float32, torch.bfloat16), strict=True):
        accumulate_weight_gradient(target, torch.ones(4, 3, dtype=dtype), torch.ones(4, 5, dtype=dtype), implementation)
    return targets


def call_accumulate_rows(implementation: str) -> list[torch.Tensor]:
    table = torch.ones(3, 5)
    accumulate_rows(table, torch.ones(2, 5), torch.tensor([0, 2]), implementation)
    return [table]


def call_logit_gradients(implementation: str) -> list[torch.Tensor]:
    logits, targets, loss = torch.rand(2, 5), torch.tensor([0, 3]), CrossEntropy(5)
    statistics = loss_statistics(logits, targets, loss, implementation)
    logit_gradients_(
        logits, targets, (statistics.largest, statistics.exponentials), torch.ones(2), loss, implementation
    )
    return [logits]


@every_implementation
@pytest.mark.parametrize(
    "call",
    [call_adamw, call_accumulate, call_accumulate_weight_gradient, call_accumulate_rows, call_logit_gradients],
)
def test_what_is_written_has_another_version(call: Callable[[str], list[torch.Tensor]], implementation: str) -> None:
    assert all(tensor._version > 0 for tensor in call(implementation))


@every_implementation
def test_what_has_no_gradient_does_not_claim_one(implementation: str) -> None:
    source = torch.ones(2, 5, requires_grad=True)
    flat, table, total = torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(5, 5)
    accumulate(flat, source, implementation=implementation)
    accumulate_rows(table, source, torch.tensor([0, 2]), implementation)
    accumulate_weight_gradient(total, source, source, implementation)
    squares = sum_of_squares([source], source.device, implementation)
    assert not any(tensor.requires_grad for tensor in (flat, table, total, squares))


@every_implementation
@pytest.mark.parametrize("shape", [(5, 3, 7), (0, 3, 7), (1, 1, 1), (64, 96, 128)], ids=str)
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
def test_weight_gradients_add_up(dtype: torch.dtype, shape: tuple[int, int, int], implementation: str) -> None:
    accuracy.check_weight_gradients("cpu", dtype, shape, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_compile_as_one_graph(dtype: torch.dtype) -> None:
    def added(gradient: torch.Tensor, grad_output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        accumulate_weight_gradient(gradient, grad_output, input)
        return gradient * 2

    gradients = [torch.ones(3, 5), torch.ones(3, 5)]
    factors = torch.randn(4, 3).to(dtype), torch.randn(4, 5).to(dtype)
    compiled = torch.compile(added, fullgraph=True, backend="aot_eager")
    assert torch.equal(*(function(each, *factors) for function, each in zip((compiled, added), gradients, strict=True)))
    assert torch.equal(*gradients)
