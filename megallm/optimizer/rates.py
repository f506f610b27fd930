"""What an update moves by at a position in training: learning rates and weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megallm.optimizer.learning_rate import LearningRateSchedule


@dataclass(frozen=True)
class WeightDecaySchedule:
    """Weight decay that goes from `start` to `end` over the first `samples`, and stays there.

    `style` is constant, linear or cosine. The position is that of the learning rate.
    """

    start: float
    end: float
    style: str
    samples: int

    def at(self, position: torch.Tensor) -> float | torch.Tensor:
        """Weight decay at `position` (float64 scalar): a number where it never changes, else a scalar on the device."""
        if self.style == "constant":
            return self.end
        done = (position / max(1, self.samples)).clamp(max=1.0)
        if self.style == "cosine":
            done = 0.5 * (1.0 - torch.cos(math.pi * done))
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Rates:
    """Learning rate of one update, that of the word embedding and the output layer, and weight decay.

    Learning rates are float64 scalars on the device; the weight decay is one too, or a number that never changes.
    """

    learning_rate: torch.Tensor
    vocabulary_learning_rate: torch.Tensor
    weight_decay: float | torch.Tensor


@dataclass(frozen=True)
class RateSchedules:
    """All of these over the run. `vocabulary` is None where the word embedding learns at the rate of the others."""

    learning_rate: LearningRateSchedule
    weight_decay: WeightDecaySchedule
    vocabulary: LearningRateSchedule | None = None

    def at(self, position: torch.Tensor) -> Rates:
        """The rates at `position`, a float64 scalar tensor of samples."""
        rate = self.learning_rate.at(position)
        vocabulary = rate if self.vocabulary is None else self.vocabulary.at(position)
        return Rates(rate, vocabulary, self.weight_decay.at(position))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of them: plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RateSchedules:
        """The schedules of which `state` is."""
        vocabulary = state["vocabulary"]
        return cls(
            LearningRateSchedule(**state["learning_rate"]),
            WeightDecaySchedule(**state["weight_decay"]),
            None if vocabulary is None else LearningRateSchedule(**vocabulary),
        )
