"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on one flat tensor, all that changes read on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw as fused_adamw

from megallm.ops.library import NATIVE, register_fakes

__all__ = ["adamw", "adamw_reference"]


@torch.no_grad()
def adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    num_updates: Tensor,
    rounded: Tensor | None,
    *,
    learning_rate: Tensor,
    weight_decay: Tensor,
    gradient_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    implementation: str = "auto",
) -> None:
    """Updates `weights` and both moments in place, and with `rounded` writes the new weights there in 16 bits.

    weights, gradient, moments: flat, contiguous, all float32 or all float64, of one length; the gradient may be
        overwritten.
    num_updates: float32 scalar, the updates made so far; goes up by one.
    rounded: bfloat16 or float16, as long as the weights, which then are float32.
    learning_rate, weight_decay, gradient_scale (multiplies the gradient), skip: float64 scalars on the same device, so
        that nothing waits for the host. Where `skip` is not 0, nothing changes but the gradient.

    The native operator makes one pass over everything, and computes each element alike wherever it lies.
    """
    if NATIVE.serves("adamw", weights, implementation):
        torch.ops.megallm.adamw_(
            weights,
            gradient,
            first_moment,
            second_moment,
            num_updates,
            rounded,
            learning_rate,
            weight_decay,
            gradient_scale,
            skip,
            beta1,
            beta2,
            epsilon,
        )
        written = (weights, first_moment, second_moment, num_updates)
        increment_version(written if rounded is None else (*written, rounded))
        return
    update = _torch_adamw if implementation == "torch" and weights.numel() else adamw_reference
    update(
        weights,
        gradient,
        first_moment,
        second_moment,
        num_updates,
        rounded,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        gradient_scale=gradient_scale,
        skip=skip,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
    )


def adamw_reference(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    num_updates: Tensor,
    rounded: Tensor | None,
    *,
    learning_rate: Tensor,
    weight_decay: Tensor,
    gradient_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """The same in plain torch."""
    gradient.mul_(gradient_scale)
    updates = num_updates.double() + 1.0
    first = torch.lerp(first_moment, gradient, 1.0 - beta1)
    second = torch.addcmul(second_moment * beta2, gradient, gradient, value=1.0 - beta2)
    denominator = (second.sqrt() / (1.0 - beta2**updates).sqrt()).add_(epsilon)
    step = (first / denominator).mul_(learning_rate / (1.0 - beta1**updates))
    stays = skip != 0
    weights.copy_(torch.where(stays, weights, weights * (1.0 - learning_rate * weight_decay) - step))
    first_moment.copy_(torch.where(stays, first_moment, first))
    second_moment.copy_(torch.where(stays, second_moment, second))
    num_updates.copy_(torch.where(stays, num_updates, updates.to(num_updates.dtype)))
    if rounded is not None:
        rounded.copy_(weights)


def _torch_adamw(
    weights: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    num_updates: Tensor,
    rounded: Tensor | None,
    *,
    learning_rate: Tensor,
    weight_decay: Tensor,
    gradient_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """Through torch's own fused AdamW, which on a GPU takes the learning rate in float32."""
    gradient.mul_(gradient_scale)
    # torch's function takes a number for the decay, which only the host could give it.
    weights.mul_(1.0 - learning_rate * weight_decay * (1.0 - skip))
    fused_adamw(
        [weights],
        [gradient],
        [first_moment],
        [second_moment],
        [],
        [num_updates],
        fused=True,
        found_inf=skip.float(),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=learning_rate.float() if weights.is_cuda else learning_rate,
        weight_decay=0.0,
        eps=epsilon,
        maximize=False,
    )
    if rounded is not None:
        rounded.copy_(weights)


def _fake_adamw(*arguments: object) -> None:
    return None


register_fakes({"adamw_": _fake_adamw})
