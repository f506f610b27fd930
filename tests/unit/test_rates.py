"""Learning rates and weight decay: golden values, and those of whole runs.

Golden values are worked out by hand from the formulas of Megatron's scheduler, which the comments state; p is the
position in samples.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megallm.config import resolve
from megallm.config.batch_sizes import batch_sizes_of
from megallm.config.dictionary import build
from megallm.optimizer.learning_rate import LearningRateSchedule
from megallm.optimizer.rates import RateSchedules, WeightDecaySchedule
from megallm.train.rates import rate_schedules


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


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
    with pytest.raises(ValueError, match="use --lr-decay-style constant, linear, cosine"):
        rates("steps", [0])


def test_the_rate_is_a_double_on_the_positions_device() -> None:
    schedule = LearningRateSchedule(3e-4, 3e-5, "cosine", warmup_samples=10, decay_samples=100)
    rate = schedule.at(scalar(4.0))
    assert rate.dtype == torch.float64
    assert rate.shape == ()


# Peak 1, minimum 0.1, warm-up 100, decay up to 1100, of which WSD takes the last 400: it begins at 700.
GOLDEN = {
    # max(0.1, 1 x sqrt(100 / p)) after the warm-up, and 0.1 beyond 1100: sqrt(1/4), sqrt(1/9), sqrt(1/11)
    "inverse-square-root": {50: 0.5, 100: 1.0, 400: 0.5, 900: 1 / 3, 1100: 0.30151134457776363, 1101: 0.1},
    # 0.1 + 0.9 x (1 - r) with r = (p - 700) / 400
    "linear": {50: 0.5, 700: 1.0, 800: 0.775, 900: 0.55, 1100: 0.1, 5000: 0.1},
    # 0.1 + 0.9 x (cos(pi r) + 1) / 2: at r = 1/4 the cosine is sqrt(1/2)
    "cosine": {100: 1.0, 700: 1.0, 800: 0.8681980515339464, 900: 0.55, 1100: 0.1, 5000: 0.1},
    # 0.1 + 0.9 x (2 x 0.5^r - 1): at r = 1/4 and 1/2, 0.5^r is 0.8408964152537145 and sqrt(1/2)
    "exponential": {400: 1.0, 700: 1.0, 800: 0.7136135474566862, 900: 0.4727922061357856, 1100: 0.1, 1101: 0.1},
    # 0.1 + 0.9 x (1 - sqrt(r)): sqrt(r) is 1/2 and sqrt(1/2)
    "minus_sqrt": {700: 1.0, 800: 0.55, 900: 0.3636038969321072, 1100: 0.1},
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_golden_values(shape: str) -> None:
    style = shape if shape == "inverse-square-root" else "WSD"
    schedule = LearningRateSchedule(
        peak=1.0,
        minimum=0.1,
        style=style,
        warmup_samples=100,
        decay_samples=1100,
        wsd_decay_samples=400,
        wsd_decay_style=shape,
    )
    got = {position: float(schedule.at(scalar(position))) for position in GOLDEN[shape]}
    assert got == pytest.approx(GOLDEN[shape], rel=1e-14)


def test_inverse_square_root_without_warmup_falls_from_the_first_sample() -> None:
    schedule = LearningRateSchedule(1.0, 0.0, "inverse-square-root", warmup_samples=0, decay_samples=100)
    # Megatron counts at least one sample of either: 1 x sqrt(1 / max(p, 1))
    assert [float(schedule.at(scalar(p))) for p in (0, 1, 4, 100, 101)] == pytest.approx([1.0, 1.0, 0.5, 0.1, 0.0])


@pytest.mark.parametrize(
    ("style", "golden"),
    [
        # start + (end - start) x p / 1000
        ("linear", {0: 0.02, 250: 0.04, 500: 0.06, 1000: 0.1, 2000: 0.1}),
        # start + (end - start) x (cos(pi (1 - p / 1000)) + 1) / 2: at 250, (1 - sqrt(1/2)) / 2 of the way
        ("cosine", {0: 0.02, 250: 0.03171572875253810, 500: 0.06, 1000: 0.1, 2000: 0.1}),
    ],
)
def test_weight_decay_goes_from_its_start_to_its_end(style: str, golden: dict[int, float]) -> None:
    schedule = WeightDecaySchedule(0.02, 0.1, style, 1000)
    assert {p: float(schedule.at(scalar(p))) for p in golden} == pytest.approx(golden, rel=1e-14)


def schedules_of(**settings: Any) -> RateSchedules:
    sizes = {"train_iters": 10, "micro_batch_size": 8, "rampup_batch_size": []}
    values = {f"training.{name}": settings.pop(name, value) for name, value in sizes.items()}
    values |= {
        f"training.{name}": settings.pop(name) for name in ("train_samples", "global_batch_size") if name in settings
    }
    values |= {
        f"optimizer.{name}": value for name, value in ({"lr": 1.0, "lr_decay_style": "linear"} | settings).items()
    }
    config = resolve(
        build({**values, "model.num_layers": 1, "model.hidden_size": 8, "model.num_attention_heads": 1}), 1
    )
    return rate_schedules(config, batch_sizes_of(config))


def run_of(schedules: RateSchedules, num_steps: int, batch: int = 8) -> list[float]:
    return [float(schedules.at(scalar(batch * step)).learning_rate) for step in range(num_steps)]


def test_a_run_with_warmup_as_a_fraction() -> None:
    # 80 samples, a quarter of them warm-up: p / 20 up to 20, then (80 - p) / 60
    wanted = [0.0, 0.4, 0.8, 56 / 60, 48 / 60, 40 / 60, 32 / 60, 24 / 60, 16 / 60, 8 / 60]
    assert run_of(schedules_of(lr_warmup_fraction=0.25), 10) == pytest.approx(wanted, rel=1e-14)
    by_samples = schedules_of(train_iters=0, train_samples=80, lr_warmup_samples=20)
    assert run_of(by_samples, 10) == pytest.approx(wanted, rel=1e-14)
    # A fraction of the decay, not of the run, and not rounded to samples: 0.3 x 25 = 7.5
    fraction = schedules_of(train_iters=0, train_samples=80, lr_decay_samples=25, lr_warmup_fraction=0.3)
    assert fraction.learning_rate.warmup_samples == 7.5


def test_a_run_with_wsd() -> None:
    wanted = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear"}
    assert run_of(schedules_of(**wsd, lr_wsd_decay_iters=4, lr_warmup_iters=2), 10) == pytest.approx(wanted)
    by_samples = schedules_of(
        **wsd, train_iters=0, train_samples=80, lr_wsd_decay_samples=32, lr_warmup_samples=16, lr_decay_samples=80
    )
    assert run_of(by_samples, 10) == pytest.approx(wanted)


def test_the_last_steps_of_wsd_are_the_large_ones_where_the_batch_grows() -> None:
    # Batches of 8 and then 16: 24 samples in three steps, then 7 steps of 16 up to 136; the last two are 32 samples.
    growing = schedules_of(
        lr_decay_style="WSD", lr_wsd_decay_iters=2, global_batch_size=16, rampup_batch_size=["8", "8", "24"]
    )
    assert growing.learning_rate.decay_samples == 136
    assert growing.learning_rate.wsd_decay_samples == 32


def test_word_embedding_and_output_layer_may_learn_at_their_own_rate() -> None:
    schedules = schedules_of(lr_warmup_iters=2, min_lr=0.1, decoupled_lr=0.2)
    rates = [schedules.at(scalar(position)) for position in (8, 16, 80)]
    assert [float(rate.learning_rate) for rate in rates] == pytest.approx([0.5, 1.0, 0.1])
    assert [float(rate.vocabulary_learning_rate) for rate in rates] == pytest.approx([0.1, 0.2, 0.1])
    lower = schedules_of(decoupled_lr=0.2, decoupled_min_lr=0.02)
    assert float(lower.at(scalar(80)).vocabulary_learning_rate) == pytest.approx(0.02)
    same = schedules_of().at(scalar(8))
    assert same.vocabulary_learning_rate is same.learning_rate


def test_weight_decay_follows_the_length_of_the_run_and_a_constant_one_stays_a_number() -> None:
    schedules = schedules_of(start_weight_decay=0.0, end_weight_decay=0.8, weight_decay_incr_style="linear")
    assert float(schedules.at(scalar(20)).weight_decay) == pytest.approx(0.2)
    constant = schedules_of(weight_decay=0.3).at(scalar(20)).weight_decay
    assert type(constant) is float
    assert constant == 0.3


def test_schedules_come_back_from_a_checkpoint() -> None:
    for schedules in (schedules_of(lr_warmup_fraction=0.3, decoupled_lr=0.5), schedules_of()):
        assert RateSchedules.from_state(schedules.state()) == schedules
