"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

import torch
from torch import nn

from megallm.layers.context import LayoutContext
from megallm.layers.linear import ColumnParallelLinear, RowParallelLinear
from megallm.ops import geglu, gelu, gelu_tanh, relu, squared_relu, swiglu
from megallm.parameter import InitialMethod

_GATED = {"swiglu": swiglu, "geglu": geglu}
_PLAIN = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "squared_relu": squared_relu}


class MLP(nn.Module):
    """[sequence (/ tp), batch, hidden] -> the same shape, through `ffn_hidden_size` features.

    Gated activations take gate and up from one matrix: act(gate) x up. The bias of the output is left to what follows,
    which adds it together with dropout and residual.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        ffn_hidden_size: int,
        activation: str,
        context: LayoutContext,
        *,
        bias: bool,
        initial: InitialMethod,
        output_initial: InitialMethod,
    ) -> None:
        super().__init__()
        self.activation = (_GATED | _PLAIN)[activation]
        self.implementation = context.operators.of(activation)
        names = ("gate", "up") if activation in _GATED else ("up",)
        self.input = ColumnParallelLinear(
            {f"{name}.{which}": ffn_hidden_size for which in names},
            hidden_size,
            context,
            bias=bias,
            initial=initial,
        )
        self.output = RowParallelLinear(
            f"{name}.down",
            ffn_hidden_size,
            hidden_size,
            context,
            bias=bias,
            initial=output_initial,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        activated = self.activation(self.input.product(hidden), self.input.bias, self.implementation)
        return self.output.product(activated)
