"""AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019) on flat tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class AdamWSettings:
    """Constants of the update."""

    beta1: float
    beta2: float
    epsilon: float


@dataclass
class AdamWState:
    """Moments of one flat tensor, in its dtype, and the number of updates made (float32 scalar)."""

    first_moment: torch.Tensor
    second_moment: torch.Tensor
    num_updates: torch.Tensor

    def moments(self) -> dict[str, torch.Tensor]:
        """The flat tensors, by the names that checkpoints give them."""
        return {"first_moment": self.first_moment, "second_moment": self.second_moment}


def new_state(weights: torch.Tensor) -> AdamWState:
    """The state before the first update."""
    return AdamWState(
        torch.zeros_like(weights),
        torch.zeros_like(weights),
        torch.zeros((), dtype=torch.float32, device=weights.device),
    )


def adamw_step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamWState,
    settings: AdamWSettings,
    *,
    learning_rate: torch.Tensor,
    weight_decay: float | torch.Tensor,
    clip_coefficient: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """Updates flat `weights` in place.

    `learning_rate` (float64), `clip_coefficient` (multiplies the gradient) and `skip` (1 leaves everything as it was)
    are scalars on the tensors' device, so that nothing waits for the host. `weight_decay` may be one too. On a GPU the
    learning rate is rounded to float32. `gradient` is overwritten.
    """
    if weights.numel() == 0:
        return
    gradient.mul_(clip_coefficient)
    if isinstance(weight_decay, torch.Tensor):
        # torch's function takes a number, which only the host could give it.
        weights.mul_(1.0 - learning_rate * weight_decay * (1.0 - skip))
        weight_decay = 0.0
    adamw(
        [weights],
        [gradient],
        [state.first_moment],
        [state.second_moment],
        [],
        [state.num_updates],
        fused=True,
        found_inf=skip.float(),
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=learning_rate.float() if weights.is_cuda else learning_rate,
        weight_decay=weight_decay,
        eps=settings.epsilon,
        maximize=False,
    )
