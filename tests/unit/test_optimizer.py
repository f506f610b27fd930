from __future__ import annotations

import math

import pytest
import torch

from megallm.optimizer.adamw import AdamWSettings, adamw_step, new_state
from megallm.optimizer.clipping import clip_coefficient, squared_norm
from megallm.optimizer.learning_rate import LearningRateSchedule

SETTINGS = AdamWSettings(beta1=0.9, beta2=0.95, epsilon=1e-8)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def take_step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: object,
    *,
    rate: float = 1e-2,
    decay: float = 0.1,
    coefficient: float = 1.0,
    skip: float = 0.0,
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
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_adamw_is_that_of_torch(dtype: torch.dtype, bound: float, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(257, generator=generator, dtype=dtype)
    theirs = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=False)
    state = new_state(weights)
    for step in range(10):
        gradient = torch.randn(257, generator=generator, dtype=dtype)
        rate, coefficient = 1e-2 / (1 + step), 0.25 + 0.05 * step
        theirs.grad = gradient * coefficient
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        take_step(weights, gradient, state, rate=rate, decay=decay, coefficient=coefficient)
        assert torch.allclose(weights, theirs.detach(), rtol=bound, atol=bound)
    assert state.first_moment.dtype == dtype
    assert float(state.num_updates) == 10


def test_a_skipped_step_leaves_everything_as_it_was() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(65, generator=generator, dtype=torch.float64) for _ in range(4)]
    start = torch.randn(65, generator=generator, dtype=torch.float64)
    weights, never_skipped = start.clone(), start.clone()
    state, other_state = new_state(weights), new_state(never_skipped)
    for number, gradient in enumerate(gradients):
        take_step(never_skipped, gradient.clone(), other_state)
        take_step(weights, gradient.clone(), state)
        if number == 1:
            before = [t.clone() for t in (weights, state.first_moment, state.second_moment, state.num_updates)]
            broken = torch.full_like(gradient, math.nan)
            broken[3] = math.inf
            take_step(weights, broken, state, coefficient=math.nan, skip=1.0)
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
    norm = squared_norm([*gradients, torch.empty(0, dtype=torch.float64)], torch.device("cpu")).sqrt()
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
    assert float(squared_norm(tensors, torch.device("cpu"))) == pytest.approx(4.5e38, rel=1e-6)
    assert float(squared_norm([], torch.device("cpu"))) == 0.0


def rates(style: str, positions: list[int], warmup: int = 0, start: float = 0.0) -> list[float]:
    schedule = LearningRateSchedule(
        peak=1.0, minimum=0.1, style=style, warmup_samples=warmup, decay_samples=100 + warmup, warmup_start=start
    )
    return [float(schedule.at(scalar(position))) for position in positions]


def test_constant() -> None:
    assert rates("constant", [0, 50, 100, 1000]) == [1.0] * 4


def test_linear_goes_down_to_the_minimum_and_stays() -> None:
    assert rates("linear", [0, 25, 50, 100, 1000]) == pytest.approx([1.0, 0.775, 0.55, 0.1, 0.1])


def test_cosine_goes_down_to_the_minimum_and_stays() -> None:
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert rates("cosine", [0, 25, 50, 100, 1000]) == pytest.approx([1.0, quarter, 0.55, 0.1, 0.1])


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_warmup_rises_to_the_peak_from_its_start(style: str) -> None:
    assert rates(style, [0, 5, 10, 20], warmup=20) == pytest.approx([0.0, 0.25, 0.5, 1.0])
    assert rates(style, [0, 10, 20], warmup=20, start=0.5) == pytest.approx([0.5, 0.75, 1.0])


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_decay_begins_when_the_warmup_ends(style: str) -> None:
    assert rates(style, [20, 70, 120, 500], warmup=20) == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="use constant, linear or cosine"):
        rates("steps", [0])


def test_the_rate_is_a_double_on_the_positions_device() -> None:
    schedule = LearningRateSchedule(3e-4, 3e-5, "cosine", warmup_samples=10, decay_samples=100)
    rate = schedule.at(scalar(4.0))
    assert rate.dtype == torch.float64
    assert rate.shape == ()
