"""RMSNorm: each row divided by its root mean square (Zhang and Sennrich 2019, arXiv:1910.07467).

y = x * weight / sqrt(mean(x^2) + epsilon), the mean over the last dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megallm.ops.library import NATIVE, apex_norms, register_fakes

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, implementation: str = "auto") -> Tensor:
    """RMSNorm over the last dimension of `x` [..., width], with `weight` [width]; returns the shape and dtype of `x`.

    `x` is float32, bfloat16, float16 or float64; `weight` has the same dtype or is float32. Sums are carried in float32
    (float64 for float64) and the result is rounded once. `x` may be a slice of a packed tensor; it is not copied as
    long as its last dimension is contiguous. The native operator is deterministic: a row's result depends on that row
    alone, and the weight's gradient is summed in a fixed order. Not differentiable twice. Raises ValueError when the
    shapes or dtypes do not fit.
    """
    _check(x, weight)
    if NATIVE.serves("rms_norm", x, implementation):
        return _RMSNorm.apply(x, weight, epsilon)
    if implementation == "torch":
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)
    if implementation == "apex":
        return apex_norms().fused_rms_norm_affine(x, weight, weight.shape, epsilon)
    return rms_norm_reference(x, weight, epsilon)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same in plain torch."""
    wide = x.to(_accumulation_dtype(x.dtype))
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (normalised * weight.to(wide.dtype)).to(x.dtype)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"RMSNorm needs a weight as long as the last dimension of its input, but the input has shape "
            f"{tuple(x.shape)} and the weight {tuple(weight.shape)}."
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"RMSNorm works on float32, bfloat16, float16 and float64, not on {x.dtype}.")
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"RMSNorm's weight must have its input's dtype {x.dtype} or be float32, not {weight.dtype}.")


class _RMSNorm(torch.autograd.Function):
    # The raw operators have no autograd of their own: called on tensors that require gradients they would drop them in
    # silence.

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, reciprocal_rms = torch.ops.megallm.rms_norm_forward(x, weight, epsilon, 0.0)
        ctx.save_for_backward(x, weight, reciprocal_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, reciprocal_rms = ctx.saved_tensors
        grad_x, grad_weight = torch.ops.megallm.rms_norm_backward(grad_output, x, weight, reciprocal_rms, None, 0.0)
        return grad_x, grad_weight.to(weight.dtype), None


def _fake_forward(x: Tensor, weight: Tensor | None, epsilon: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), x.new_empty(rows, dtype=_accumulation_dtype(x.dtype))


def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    reciprocal_rms: Tensor,
    grad_residual: Tensor | None,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    width = 0 if weight is None else x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(width, dtype=_accumulation_dtype(x.dtype))


register_fakes({"rms_norm_forward": _fake_forward, "rms_norm_backward": _fake_backward})
