"""The choice of the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen.

    Temperature 0 takes the most likely one; `top_k` 0 and `top_p` 1 leave all tokens in. A `repetition_penalty` above 1
    makes tokens that were there already less likely (Keskar et al., "CTRL", 2019, arXiv:1909.05858, section 4.1).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(
                f"--temperature {self.temperature} is not in [0, inf); 0 takes the most likely token, 1 samples"
            )
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} is negative; 0 leaves all tokens in")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p {self.top_p} is not in (0, 1]; 1 leaves all tokens in")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"--repetition-penalty {self.repetition_penalty} is not positive; 1 leaves all as it is")


def choose(
    logits: torch.Tensor, settings: SamplingSettings, generator: torch.Generator, seen: Sequence[int] = ()
) -> torch.Tensor:
    """A token from `logits` [vocabulary], where the tokens `seen` were there already: int64 scalar."""
    if settings.repetition_penalty != 1.0 and seen:
        rows = torch.tensor(sorted(set(seen)), dtype=torch.int64)
        there = logits[rows]
        penalty = settings.repetition_penalty
        logits = logits.index_copy(0, rows, torch.where(there > 0, there / penalty, there * penalty))
    if settings.temperature == 0.0:
        return logits.argmax()
    logits = logits / settings.temperature
    if settings.top_k:
        kept = min(settings.top_k, len(logits))
        logits = logits.masked_fill(logits < logits.topk(kept).values[-1], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if settings.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # A token stays if those before it do not reach top_p by themselves: the most likely one always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= settings.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(0)
