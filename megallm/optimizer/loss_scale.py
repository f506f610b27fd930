"""What the loss is multiplied by before its backward pass, so that float16 can hold the gradients.

float16 knows nothing between 0 and 2^-24 and nothing above 65504. Gradients are mostly small: with the loss they are
moved up into that range (Micikevicius et al. 2018, arXiv:1710.03740), and moved back when they stand in float32. How
far is found by trying: a step whose gradients overflow is skipped, and the scale goes down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


class LossScale:
    """A scale that stays as it is. Attribute `value`: float64 scalar on the device."""

    def __init__(self, value: float, device: torch.device) -> None:
        self.value = torch.tensor(value, dtype=torch.float64, device=device)

    def update(self, skipped: torch.Tensor) -> None:
        """Takes note of a step: `skipped`, a scalar, is 1 where its gradients were not finite and 0 elsewhere."""

    def state(self) -> dict[str, float]:
        """What a checkpoint holds of it. Waits for the device."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Goes on where another scale was, of whose kind `state` is."""


@dataclass(frozen=True)
class DynamicLossScaleSettings:
    """Where a dynamic scale starts and how it moves.

    `window`: steps in a row with finite gradients after which it doubles. `hysteresis`: skipped steps since the last
    doubling from which on each halves it, down to `minimum` at the least.
    """

    initial: float
    minimum: float
    window: int
    hysteresis: int


class DynamicLossScale(LossScale):
    """A scale that doubles while all goes well and halves when gradients overflow, by Megatron's rules.

    A skipped step takes one from what is left of the hysteresis, and once nothing is left halves the scale. Steps that
    succeed do not give it back; only a doubling makes it whole again. Everything is computed on the device.
    """

    def __init__(self, settings: DynamicLossScaleSettings, device: torch.device) -> None:
        super().__init__(settings.initial, device)
        self.settings = settings
        self._growth_tracker = torch.zeros_like(self.value)
        self._hysteresis_tracker = torch.full_like(self.value, settings.hysteresis)

    def update(self, skipped: torch.Tensor) -> None:
        overflowed, settings = skipped > 0, self.settings
        hysteresis = self._hysteresis_tracker - overflowed.double()
        growth = (self._growth_tracker + 1).masked_fill(overflowed, 0)
        # At least, not equal: a run may be resumed with a smaller window.
        grows, shrinks = growth >= settings.window, overflowed & (hysteresis <= 0)
        smaller = (self.value * 0.5).clamp(min=settings.minimum)
        # In place: a recorded step keeps these tensors.
        self.value.copy_(torch.where(shrinks, smaller, torch.where(grows, self.value * 2, self.value)))
        self._growth_tracker.copy_(growth.masked_fill(grows, 0))
        self._hysteresis_tracker.copy_(hysteresis.masked_fill(grows, settings.hysteresis))

    def state(self) -> dict[str, float]:
        return {
            "scale": float(self.value),
            "growth_tracker": float(self._growth_tracker),
            "hysteresis_tracker": float(self._hysteresis_tracker),
        }

    def load_state(self, state: Mapping[str, float]) -> None:
        """A constant scale's state holds nothing; this one then stays as it is."""
        if state:
            self.value.fill_(state["scale"])
            self._growth_tracker.fill_(state["growth_tracker"])
            self._hysteresis_tracker.fill_(state["hysteresis_tracker"])
