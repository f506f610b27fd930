"""Where a token stands: rotary angles and sinusoidal tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from megallm.ops import apply_rotary, split_and_rotate


@dataclass(frozen=True)
class FrequencyScaling:
    """How Llama 3.1 and later slow down rotary frequencies for texts longer than `original_length`.

    A frequency that turns fewer than `low` times within the original length is divided by `factor`, one that turns
    more than `high` times stays, and between the two the division fades out linearly in the number of turns.
    """

    factor: float
    low: float
    high: float
    original_length: int

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Scaled frequencies, of the same shape."""
        turns = self.original_length * frequencies / (2.0 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / self.factor


def rotary_frequencies(width: int, base: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Radians per position of each pair of rotated features: [width / 2] of `dtype`, base ** (-2 i / width)."""
    return base ** -(torch.arange(0, width, 2, device=device, dtype=dtype) / width)


def rotary_table(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for rotary positions (Su et al., "RoFormer", 2021).

    positions: int64 [sequence, batch or 1]; frequencies: [width / 2]. Returns two tensors [sequence, batch or 1, 1,
    width] of the frequencies' dtype, for features i and i + width / 2 the same value: position x frequency i.
    """
    angles = positions.to(frequencies.dtype).unsqueeze(-1) * frequencies
    # [sequence, batch, width / 2] -> [sequence, batch, 1, width]
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Rotation:
    """The rotation of queries and keys at the positions of one micro-batch.

    Attributes:
        cosines, sines: [sequence, batch or 1, 1, width], width at most that of a head; other features stay.
        interleaved: whether features 2 i and 2 i + 1 are a pair (GPT-J), or i and i + width / 2 (GPT-NeoX, Llama).
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    interleaved: bool

    def apply(self, query: torch.Tensor, key: torch.Tensor, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [sequence, batch, heads, head_dim], rotated."""
        query, key = apply_rotary((query, key), self.cosines, self.sines, self.interleaved, implementation)
        return query, key

    def split(
        self, packed: torch.Tensor, heads: tuple[int, int, int], implementation: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [sequence, batch, heads, head_dim] out of one tensor [sequence, batch, features].

        `heads` are the numbers of heads of each. Queries and keys are rotated.
        """
        return split_and_rotate(packed, heads, self.cosines, self.sines, self.interleaved, implementation)


class RotaryPositions(nn.Module):
    """Makes the `Rotation` of a micro-batch from a table of all positions."""

    cosines: torch.Tensor
    sines: torch.Tensor

    def __init__(self, num_positions: int, frequencies: torch.Tensor, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        positions = torch.arange(num_positions, device=frequencies.device).unsqueeze(1)
        cosines, sines = rotary_table(positions, frequencies)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    def forward(self, sequence_length: int, position_ids: torch.Tensor | None) -> Rotation:
        """`position_ids` int64 [batch, sequence], or None for 0, 1, 2, ... in every sequence."""
        if position_ids is None:
            return Rotation(self.cosines[:sequence_length], self.sines[:sequence_length], self.interleaved)
        positions = position_ids.t()  # [batch, sequence] -> [sequence, batch]
        # [sequence, batch, 1, width]
        return Rotation(self.cosines[positions, 0], self.sines[positions, 0], self.interleaved)


def sinusoidal_table(length: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[length, hidden].

    Sines at even features, cosines at odd ones, of position / 10000 ** (2 i / hidden) (Vaswani et al., 2017).
    """
    exponents = torch.arange(0, hidden_size, 2, device=device, dtype=torch.float64) / hidden_size
    angles = torch.arange(length, device=device, dtype=torch.float64).unsqueeze(1) * 10000.0**-exponents
    # [length, hidden / 2, 2] -> [length, hidden]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(length, hidden_size).to(dtype)
