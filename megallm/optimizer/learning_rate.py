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

    `style` is constant, linear, cosine, inverse-square-root (peak x sqrt(warm-up / position), from the end of the
    warm-up on) or WSD (warm-up, stable, decay: Hu et al., 2024, arXiv:2404.06395), which stays at the peak until
    `wsd_decay_samples` before the end and then falls as `wsd_decay_style` says.
    """

    peak: float
    minimum: float
    style: str
    warmup_samples: float
    decay_samples: int
    warmup_start: float = 0.0
    wsd_decay_samples: int = 0
    wsd_decay_style: str = "exponential"

    def at(self, position: torch.Tensor) -> torch.Tensor:
        """Learning rate at `position` (float64 scalar tensor of samples): float64 scalar on the same device."""
        rate = self._after_warmup(position)
        if self.warmup_samples == 0:
            return rate
        rising = self.warmup_start + (self.peak - self.warmup_start) * position / self.warmup_samples
        return torch.where(position <= self.warmup_samples, rising, rate)

    def _after_warmup(self, position: torch.Tensor) -> torch.Tensor:
        if self.style == "constant":
            return torch.full_like(position, self.peak)
        if self.style == "inverse-square-root":
            rate = self.peak * (max(self.warmup_samples, 1.0) / position.clamp(min=1.0)).sqrt()
            return rate.clamp(min=self.minimum).masked_fill(position > self.decay_samples, self.minimum)
        decay = self.wsd_decay_samples if self.style == "WSD" else self.decay_samples - self.warmup_samples
        shape = self.wsd_decay_style if self.style == "WSD" else self.style
        done = ((position - (self.decay_samples - decay)) / max(1, decay)).clamp(0.0, 1.0)
        return self.minimum + (self.peak - self.minimum) * _left(shape, done)


def _left(shape: str, done: torch.Tensor) -> torch.Tensor:
    """The share of the way from the peak to the minimum that is left when `done` of the decay is over: 1 to 0."""
    if shape == "linear":
        return 1.0 - done
    if shape == "cosine":
        return 0.5 * (torch.cos(math.pi * done) + 1.0)
    if shape == "exponential":
        # Half-lives: after a whole one 2 x 1/2 - 1 = 0 is left.
        return 2.0 * torch.pow(0.5, done) - 1.0
    if shape == "minus_sqrt":
        return 1.0 - done.sqrt()
    raise ValueError(
        f"a decay of shape {shape} is not known; use --lr-decay-style constant, linear, cosine, inverse-square-root "
        "or WSD, the last with --lr-wsd-decay-style linear, cosine, exponential or minus_sqrt"
    )
