"""Clipping by the global norm of the gradient."""

from __future__ import annotations

import torch


def count_zeros(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Elements of flat tensors that are exactly zero: float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total += tensor.numel() - torch.count_nonzero(tensor)
    return total


def clip_coefficient(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it.

    1 where `max_norm` is 0: float64 scalar.
    """
    if max_norm <= 0.0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
