"""Rotary positions as a configuration asks for them."""

from __future__ import annotations

import torch

from megallm.config.resolve import rotary_width
from megallm.config.tree import ModelConfig
from megallm.layers.context import LayoutContext
from megallm.layers.positions import FrequencyScaling, RotaryPositions, rotary_frequencies


def rotary_positions(model: ModelConfig, context: LayoutContext) -> RotaryPositions | None:
    """The rotary positions of `model` (resolved), or None where positions enter it in another way."""
    if model.position_embedding_type != "rope":
        return None
    assert model.max_position_embeddings, "the configuration is resolved"
    # Angles of late positions need more digits than 16 bits have.
    dtype = torch.float64 if context.dtype == torch.float64 else torch.float32
    frequencies = rotary_frequencies(rotary_width(model), model.rotary_base, dtype, context.device)
    if model.use_rope_scaling:
        scaling = FrequencyScaling(
            model.rope_scaling_factor,
            model.rope_scaling_low_freq_factor,
            model.rope_scaling_high_freq_factor,
            model.rope_scaling_original_length,
        )
        frequencies = scaling.apply(frequencies)
    if model.rotary_seq_len_interpolation_factor is not None:
        frequencies = frequencies / model.rotary_seq_len_interpolation_factor
    return RotaryPositions(model.max_position_embeddings, frequencies, model.rotary_interleaved)
