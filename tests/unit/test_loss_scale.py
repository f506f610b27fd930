"""The loss scale's rules, against a table written out by hand and against a few lines of plain Python."""

from __future__ import annotations

from random import Random

import pytest
import torch

from megallm.communication import Group, Transport
from megallm.optimizer.loss_scale import DynamicLossScale, DynamicLossScaleSettings, LossScale
from megallm.train.loss import LossScaler, LossTerm

CPU = torch.device("cpu")


def dynamic(initial: float = 64.0, minimum: float = 1.0, window: int = 3, hysteresis: int = 2) -> DynamicLossScale:
    return DynamicLossScale(DynamicLossScaleSettings(initial, minimum, window, hysteresis), CPU)


def step(scale: LossScale, skipped: bool) -> tuple[float, ...]:
    scale.update(torch.tensor(float(skipped), dtype=torch.float64))
    return tuple(scale.state().values())


# Window 3, hysteresis 2, from 64 down to 8 at the least: (skipped, scale, growth tracker, hysteresis tracker).
TABLE = [
    (1, 64, 0, 1),  # the first overflow is for free
    (0, 64, 1, 1),  # a good step does not give it back
    (0, 64, 2, 1),
    (1, 32, 0, 0),  # the window begins again
    (1, 16, 0, -1),  # and each further one halves
    (0, 16, 1, -1),
    (1, 8, 0, -2),
    (1, 8, 0, -3),  # not below the minimum
    (0, 8, 1, -3),
    (0, 8, 2, -3),
    (0, 16, 0, 2),  # three in a row: doubled, the hysteresis whole again
    (0, 16, 1, 2),
    (0, 16, 2, 2),
    (0, 32, 0, 2),
    (1, 32, 0, 1),
    (0, 32, 1, 1),
    (0, 32, 2, 1),
    (0, 64, 0, 2),
    (1, 64, 0, 1),
    (1, 32, 0, 0),
]


def test_each_line_of_the_table() -> None:
    scale = dynamic(minimum=8.0)
    for number, (skipped, *wanted) in enumerate(TABLE):
        assert step(scale, bool(skipped)) == tuple(wanted), f"line {number}"


@pytest.mark.parametrize(("window", "hysteresis"), [(1, 1), (2, 1), (3, 2), (5, 4), (1000, 2)])
def test_random_runs_follow_the_rules(window: int, hysteresis: int) -> None:
    generator = Random(window)
    scale = dynamic(2.0**20, 2.0**-3, window, hysteresis)
    value, since_overflow, left = 2.0**20, 0, hysteresis
    for _ in range(2500):
        skipped = generator.random() < (0.5 / window)
        if skipped:
            since_overflow, left = 0, left - 1
            if left <= 0:
                value = max(value / 2, 2.0**-3)
        else:
            since_overflow += 1
            if since_overflow == window:
                value, since_overflow, left = value * 2, 0, hysteresis
        assert step(scale, skipped) == (value, since_overflow, left)


def test_a_minimum_between_two_halvings_is_reached() -> None:
    scale = dynamic(initial=10.0, minimum=4.0, hysteresis=1)
    assert [step(scale, True)[0] for _ in range(3)] == [5.0, 4.0, 4.0]


def test_another_takes_up_the_state_where_it_was() -> None:
    first, second = dynamic(), dynamic(initial=2.0)
    for skipped in (True, False, True, False, False):
        step(first, skipped)
    second.load_state(first.state())
    for skipped in (False, True, True, False):
        assert step(first, skipped) == step(second, skipped)


def test_a_smaller_window_is_left_at_once() -> None:
    first, second = dynamic(window=10), dynamic(window=3)
    for _ in range(7):
        step(first, False)
    second.load_state(first.state())
    assert step(second, False)[0] == 128.0


def test_a_constant_scale_has_no_state() -> None:
    constant = LossScale(10.0, CPU)
    assert step(constant, True) == ()
    constant.load_state(dynamic().state())
    assert float(constant.value) == 10.0
    changing = dynamic()
    changing.load_state(constant.state())
    assert changing.state() == dynamic().state()


def test_the_tensors_stay_where_they_are() -> None:
    scale = dynamic(hysteresis=1)
    value = scale.value
    step(scale, True)
    scale.load_state(scale.state())
    assert scale.value is value
    assert float(value) == 32.0


def test_the_loss_is_scaled_and_its_report_is_not() -> None:
    share = torch.tensor(6.0, requires_grad=True)
    scaler = LossScaler(
        torch.tensor([4.0], dtype=torch.float64), Group((0,), 0, Transport(None)), torch.tensor(2.0**32)
    )
    loss = scaler([LossTerm("lm_loss", 0.5, share)])
    loss.backward()
    assert (float(loss.detach()), float(share.grad)) == (2.0**32 * 0.75, 2.0**32 * 0.125)  # type: ignore[arg-type]
    assert loss.dtype == torch.float32
    assert scaler.sums.tolist() == [6.0]
