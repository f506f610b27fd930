"""Where a token stands: rotary angles and sinusoidal tables."""

from __future__ import annotations

import torch


def rotary_table(
    positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for rotary positions (Su et al., "RoFormer", 2021), halves rotated as in GPT-NeoX and Llama.

    positions: int64 [sequence, batch or 1]. Returns two tensors [sequence, batch or 1, 1, head_dim] of `dtype`. Angle
        of feature i and of feature i + head_dim / 2: position x base ** (-2 i / head_dim).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.to(dtype).unsqueeze(-1) * base**-exponents
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(
        2
    )  # [sequence, batch, head_dim] -> [sequence, batch, 1, head_dim]
    return angles.cos(), angles.sin()


def sinusoidal_table(length: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[length, hidden].

    Sines at even features, cosines at odd ones, of position / 10000 ** (2 i / hidden) (Vaswani et al., 2017).
    """
    exponents = torch.arange(0, hidden_size, 2, device=device, dtype=torch.float64) / hidden_size
    angles = torch.arange(length, device=device, dtype=torch.float64).unsqueeze(1) * 10000.0**-exponents
    # [length, hidden / 2, 2] -> [length, hidden]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(length, hidden_size).to(dtype)
