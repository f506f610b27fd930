"""The learning rate as a function of the position in training, counted in samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up, then a decay from `peak` to `minimum`, which stays. Lengths are in samples.

    The position is the number of samples that moved the weights: a skipped step does not advance it. The first step is
    taken at position 0, as in Megatron: with a warm-up from 0 it moves nothing.
    """

    peak: float
    minimum: float
    style: str
    warmup_samples: int
    decay_samples: int
    warmup_start: float = 0.0

    def at(self, position: torch.Tensor) -> torch.Tensor:
        """Learning rate at `position` (float64 scalar tensor of samples): float64 scalar on the same device."""
        decay = max(1, self.decay_samples - self.warmup_samples)
        done = ((position - self.warmup_samples) / decay).clamp(0.0, 1.0)
        span = self.peak - self.minimum
        if self.style == "cosine":
            rate = self.minimum + span * 0.5 * (torch.cos(math.pi * done) + 1.0)
        elif self.style == "linear":
            rate = self.minimum + span * (1.0 - done)
        elif self.style == "constant":
            rate = torch.full_like(position, self.peak)
        else:
            raise ValueError(f"--lr-decay-style {self.style} is not known; use constant, linear or cosine")
        if self.warmup_samples == 0:
            return rate
        rising = self.warmup_start + (self.peak - self.warmup_start) * position / self.warmup_samples
        return torch.where(position <= self.warmup_samples, rising, rate)
