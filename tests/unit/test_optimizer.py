from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from megallm.ops.sum_of_squares import sum_of_squares
from megallm.optimizer.adamw import AdamWSettings, adamw_step, new_state
from megallm.optimizer.clipping import clip_coefficient
from megallm.optimizer.sgd import SGDSettings, new_sgd_state, sgd_step

SETTINGS = AdamWSettings(beta1=0.9, beta2=0.95, epsilon=1e-8)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def take_step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: object,
    *,
    rate: float = 1e-2,
    decay: float | torch.Tensor = 0.1,
    coefficient: float = 1.0,
    skip: float = 0.0,
    implementation: str = "auto",
) -> None:
    adamw_step(
        weights,
        gradient,
        state,  # type: ignore[arg-type]
        SETTINGS,
        learning_rate=scalar(rate),
        weight_decay=decay,
        clip_coefficient=scalar(coefficient),
        skip=scalar(skip),
        implementation=implementation,
    )


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["auto", "reference", "torch"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", [0.0, 0.1, "tensor"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_adamw_is_that_of_torch(dtype: torch.dtype, bound: float, decay: float | str, implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(257, generator=generator, dtype=dtype)
    theirs = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=False)
    state = new_state(weights)
    for step in range(10):
        gradient = torch.randn(257, generator=generator, dtype=dtype)
        rate, coefficient = 1e-2 / (1 + step), 0.25 + 0.05 * step
        theirs.grad = gradient * coefficient
        # A weight decay that is a tensor may be another at each step.
        value = 0.1 * step if isinstance(decay, str) else decay
        optimizer.param_groups[0].update(lr=rate, weight_decay=value)
        optimizer.step()
        given = scalar(value) if isinstance(decay, str) else value
        numbers = {"rate": rate, "decay": given, "coefficient": coefficient}
        take_step(weights, gradient, state, **numbers, implementation=implementation)
        assert torch.allclose(weights, theirs.detach(), rtol=bound, atol=bound)
    assert state.first_moment.dtype == dtype
    assert float(state.num_updates) == 10


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1, "tensor"])
def test_sgd_is_that_of_torch_and_skips(decay: float | str, momentum: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(129, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.SGD([theirs], lr=1.0, momentum=momentum, fused=False)
    state, settings = new_sgd_state(weights), SGDSettings(momentum)
    for step in range(6):
        gradient = torch.randn(129, generator=generator, dtype=torch.float64)
        rate, coefficient = 1e-2 / (1 + step), 0.25 + 0.05 * step
        value = 0.1 * step if isinstance(decay, str) else decay
        theirs.grad = gradient * coefficient
        optimizer.param_groups[0].update(lr=rate, weight_decay=value)
        optimizer.step()
        rates = {
            "learning_rate": scalar(rate),
            "weight_decay": scalar(value) if isinstance(decay, str) else value,
        }
        broken = torch.full_like(gradient, math.inf)
        sgd_step(weights, broken, state, settings, clip_coefficient=scalar(math.nan), skip=scalar(1.0), **rates)
        sgd_step(weights, gradient, state, settings, clip_coefficient=scalar(coefficient), skip=scalar(0.0), **rates)
        assert torch.allclose(weights, theirs.detach(), rtol=1e-14, atol=1e-14)
    assert float(state.num_updates) == 6
    empty = torch.empty(0)
    sgd_step(empty, empty, new_sgd_state(empty), settings, clip_coefficient=scalar(1.0), skip=scalar(0.0), **rates)


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", [0.1, scalar(0.1)])
def test_a_skipped_step_leaves_everything_as_it_was(decay: float | torch.Tensor, implementation: str) -> None:
    take = partial(take_step, decay=decay, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(65, generator=generator, dtype=torch.float64) for _ in range(4)]
    start = torch.randn(65, generator=generator, dtype=torch.float64)
    weights, never_skipped = start.clone(), start.clone()
    state, other_state = new_state(weights), new_state(never_skipped)
    for number, gradient in enumerate(gradients):
        take(never_skipped, gradient.clone(), other_state)
        take(weights, gradient.clone(), state)
        if number == 1:
            before = [t.clone() for t in (weights, state.first_moment, state.second_moment, state.num_updates)]
            broken = torch.full_like(gradient, math.nan)
            broken[3] = math.inf
            take(weights, broken, state, coefficient=math.nan, skip=1.0)
            after = (weights, state.first_moment, state.second_moment, state.num_updates)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(weights, never_skipped), "a run with a skipped step goes on as if it had not been"


def test_an_empty_shard_is_allowed() -> None:
    weights = torch.empty(0, dtype=torch.float32)
    take_step(weights, torch.empty(0), new_state(weights))


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 3.0, 1e3])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(2)
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in (7, 30, 1)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    norm = sum_of_squares([*gradients, torch.empty(0, dtype=torch.float64)], torch.device("cpu")).sqrt()
    coefficient = clip_coefficient(norm, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    assert float(norm) == pytest.approx(float(expected), rel=1e-14)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(gradient * coefficient, parameter.grad, rtol=1e-14, atol=0.0)
    assert coefficient.dtype == torch.float64


def test_no_clipping() -> None:
    assert float(clip_coefficient(scalar(1e9), 0.0)) == 1.0
    assert float(clip_coefficient(scalar(0.0), 1.0)) == 1.0


def test_squares_are_summed_in_double_width() -> None:
    tensors = [torch.tensor([1.5e19]), torch.tensor([-1.5e19, 0.0])]
    assert float(sum_of_squares(tensors, torch.device("cpu"))) == pytest.approx(4.5e38, rel=1e-6)
    assert float(sum_of_squares([], torch.device("cpu"))) == 0.0
