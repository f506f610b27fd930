"""LayerNorm: each row centred and divided by its standard deviation (Ba et al. 2016, arXiv:1607.06450)."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["layer_norm"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """LayerNorm over the last dimension of `x` [..., width], with `weight` [width] and `bias` [width] or None.

    Returns the shape and dtype of `x`. A weight of a wider dtype than `x` is used as it is: the row is widened, not the
    weight rounded. Raises ValueError when weight or bias have another length than the row.
    """
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"LayerNorm needs a {name} as long as the last dimension of its input, but the input has shape "
                f"{tuple(x.shape)} and the {name} {tuple(parameter.shape)}."
            )
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, epsilon).to(x.dtype)
