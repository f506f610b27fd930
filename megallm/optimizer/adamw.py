"""AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019) on flat tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megallm.ops.adamw import adamw


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
    rounded: torch.Tensor | None = None,
    implementation: str = "auto",
) -> None:
    """Updates flat `weights` in place.

    `learning_rate`, `clip_coefficient` (multiplies the gradient) and `skip` (1 leaves everything as it was) are float64
    scalars on the tensors' device, so that nothing waits for the host. `weight_decay` may be one too. `gradient` may be
    overwritten. `rounded`, of 16 bits, gets a copy of the new weights.
    """
    if not isinstance(weight_decay, torch.Tensor):
        weight_decay = torch.full_like(learning_rate, weight_decay)
    adamw(
        weights,
        gradient,
        state.first_moment,
        state.second_moment,
        state.num_updates,
        rounded,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        gradient_scale=clip_coefficient,
        skip=skip,
        beta1=settings.beta1,
        beta2=settings.beta2,
        epsilon=settings.epsilon,
        implementation=implementation,
    )
