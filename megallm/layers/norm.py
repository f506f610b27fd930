"""LayerNorm and RMSNorm, whole on every tensor rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megallm.layers.context import LayoutContext
from megallm.ops import layer_norm, norm_of_sum, rms_norm
from megallm.parameter import Description, Initial, make_parameter, whole


@dataclass(frozen=True)
class NormSettings:
    """What the norms of a model have in common.

    Attributes:
        kind: "LayerNorm" (with bias) or "RMSNorm".
        epsilon: added to the variance.
        zero_centered: the weight that is kept is what is added to one; it starts at zero.
    """

    kind: str
    epsilon: float
    zero_centered: bool = False


class Norm(nn.Module):
    """Normalises the last dim, of `width`.

    `gradient_partial_over` names the axes over which ranks see different rows; by default those that cut the sequence.
    """

    def __init__(
        self,
        name: str,
        settings: NormSettings,
        width: int,
        context: LayoutContext,
        gradient_partial_over: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.operators = context.operators
        partial = context.partial_axes if gradient_partial_over is None else gradient_partial_over

        def parameter(suffix: str, constant: float) -> nn.Parameter:
            description = Description(
                (whole(f"{name}.{suffix}", (width,)),),
                initial=Initial("constant", constant),
                replicated_over=("tp",),
                gradient_partial_over=partial,
                decays=False,
            )
            return make_parameter(description, context.dtype, context.device)

        self.weight = parameter("weight", 0.0 if settings.zero_centered else 1.0)
        self.bias = parameter("bias", 0.0) if settings.kind == "LayerNorm" else None

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None = None, with_sum: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        weight, bias = self._parameters_in_use()
        if with_sum:
            implementation = self.operators.of("rms_norm" if bias is None else "layer_norm")
            return norm_of_sum(
                hidden, residual, weight, bias, self.settings.epsilon, self.settings.kind, implementation
            )
        if bias is None:
            return rms_norm(hidden, weight, self.settings.epsilon, self.operators.of("rms_norm"))
        return layer_norm(hidden, weight, bias, self.settings.epsilon, self.operators.of("layer_norm"))

    def of_sum(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of hidden + residual, hidden + residual), or of `hidden` itself where the residual is None.

        Serves where the sum goes on as residual stream: it is added, and its two gradients are, inside the norm.
        """
        # Through the call of the module: what was hung before its forward pass waits for the weights.
        normalised, total = self(hidden, residual, with_sum=True)
        return normalised, total

    def _parameters_in_use(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if self.settings.zero_centered:
            # In 16 bits the sum would lose the digits that keeping the difference saves.
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight, bias = weight.to(wide) + 1.0, None if bias is None else bias.to(wide)
        return weight, bias
