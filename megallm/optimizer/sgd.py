"""Gradient descent with momentum on flat tensors, as torch.optim.SGD has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.sgd import sgd


@dataclass(frozen=True)
class SGDSettings:
    """Constants of the update."""

    momentum: float


@dataclass
class SGDState:
    """Momentum of one flat tensor, in its dtype, and the number of updates made (float32 scalar)."""

    momentum: torch.Tensor
    num_updates: torch.Tensor

    def moments(self) -> dict[str, torch.Tensor]:
        """The flat tensors, by the names that checkpoints give them."""
        return {"momentum": self.momentum}


def new_sgd_state(weights: torch.Tensor) -> SGDState:
    """The state before the first update."""
    # Momentum that starts at zero is the first gradient after the first step, as in torch.
    return SGDState(torch.zeros_like(weights), torch.zeros((), dtype=torch.float32, device=weights.device))


def sgd_step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: SGDState,
    settings: SGDSettings,
    *,
    learning_rate: torch.Tensor,
    weight_decay: float | torch.Tensor,
    clip_coefficient: torch.Tensor,
    skip: torch.Tensor,
    rounded: torch.Tensor | None = None,
) -> None:
    """Updates flat `weights` in place; arguments as those of `adamw_step`. `gradient` is overwritten.

    Weight decay is added to the gradient, and so goes through the momentum.
    """
    if weights.numel() == 0:
        return
    gradient.mul_(clip_coefficient)
    if isinstance(weight_decay, torch.Tensor):
        gradient.add_(weights * weight_decay)
        weight_decay = 0.0
    sgd(
        [weights],
        [gradient],
        [state.momentum],
        fused=True,
        found_inf=skip.float(),
        weight_decay=weight_decay,
        momentum=settings.momentum,
        lr=learning_rate.float() if weights.is_cuda else learning_rate,  # type: ignore[arg-type]
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    state.num_updates += 1.0 - skip.float()
    if rounded is not None:
        rounded.copy_(weights)
