"""LayerNorm and RMSNorm, whole on every tensor rank."""

from __future__ import annotations

import torch
from torch import nn

from megallm.layers.context import LayoutContext
from megallm.ops import layer_norm, rms_norm
from megallm.parameter import Description, make_parameter, whole


class Norm(nn.Module):
    """Normalises the last dim. `kind` is "LayerNorm" (with bias) or "RMSNorm"."""

    def __init__(self, name: str, kind: str, hidden_size: int, epsilon: float, context: LayoutContext) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.operators = context.operators

        def parameter(suffix: str, constant: float) -> nn.Parameter:
            description = Description(
                (whole(f"{name}.{suffix}", (hidden_size,)),),
                constant=constant,
                replicated_over=("tp",),
                gradient_partial_over=context.partial_axes,
                decays=False,
            )
            return make_parameter(description, context.dtype, context.device)

        self.weight = parameter("weight", 1.0)
        self.bias = parameter("bias", 0.0) if kind == "LayerNorm" else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return rms_norm(hidden, self.weight, self.epsilon, self.operators.of("rms_norm"))
        return layer_norm(hidden, self.weight, self.bias, self.epsilon)
