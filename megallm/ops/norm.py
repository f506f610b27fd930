"""LayerNorm and RMSNorm over the last dimension, alone or with the residual stream that they are taken of.

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): y = s * weight / sqrt(mean(s^2) + epsilon).
LayerNorm (Ba et al. 2016, arXiv:1607.06450): y = (s - mean(s)) * weight / sqrt(var(s) + epsilon) + bias.

Inputs are float32, bfloat16, float16 or float64; weight and bias have the same dtype or are float32. Sums are in
float32 (float64 for float64) and each result is rounded once. An input may be a slice of a packed tensor; it is not
copied as long as its last dimension is contiguous. The native operators are deterministic: a row's result depends on
that row alone, and the gradients of weight and bias are summed in a fixed order. Not differentiable twice. All raise
ValueError when shapes or dtypes do not fit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megallm.ops.library import NATIVE, apex_norms, register_fakes

__all__ = ["layer_norm", "layer_norm_reference", "norm_of_sum", "rms_norm", "rms_norm_reference"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, implementation: str = "auto") -> Tensor:
    """RMSNorm of `x` [..., width] with `weight` [width]; returns the shape and dtype of `x`."""
    _check("RMSNorm", x, weight, None)
    if NATIVE.serves("rms_norm", x, implementation):
        return _Norm.apply(x, None, weight, None, epsilon, False)[0]
    if implementation == "torch":
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)
    if implementation == "apex":
        return apex_norms().fused_rms_norm_affine(x, weight, weight.shape, epsilon)
    return rms_norm_reference(x, weight, epsilon)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, implementation: str = "auto") -> Tensor:
    """LayerNorm of `x` [..., width] with `weight` [width] and `bias` [width] or None; returns the shape and dtype of
    `x`.
    """
    _check("LayerNorm", x, weight, bias)
    if NATIVE.serves("layer_norm", x, implementation):
        return _Norm.apply(x, None, weight, bias, epsilon, True)[0]
    if implementation == "torch":
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), epsilon)
    if implementation == "apex" and bias is not None:
        return apex_norms().fused_layer_norm_affine(x, weight, bias, weight.shape, epsilon)
    return layer_norm_reference(x, weight, bias, epsilon)


def norm_of_sum(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    kind: str,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(the norm of s, s), for s = `x` + `residual` [..., width], or `x` itself where the residual is None.

    `kind` is "LayerNorm" or "RMSNorm". The sum is the same as by itself, bit for bit. What reaches s otherwise in the
    backward pass is added inside that of the norm: neither sum goes through memory by itself.
    """
    operator = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}[kind]
    _check(kind, x, weight, bias)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"The residual must be like the input, but the input is {x.dtype} {tuple(x.shape)} and the residual "
            f"{residual.dtype} {tuple(residual.shape)}."
        )
    if NATIVE.serves(operator, x, implementation):
        return _Norm.apply(x, residual, weight, bias, epsilon, kind == "LayerNorm")
    total = x if residual is None else x + residual
    if kind == "RMSNorm":
        return rms_norm(total, weight, epsilon, implementation), total
    return layer_norm(total, weight, bias, epsilon, implementation), total


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same in plain torch."""
    wide = x.to(_accumulation_dtype(x.dtype))
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (normalised * weight.to(wide.dtype)).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """The same in plain torch, in the wider dtype of input and weight."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    wide_bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), wide_bias, epsilon).to(x.dtype)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if x.dim() == 0 or parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{kind} needs a {name} as long as the last dimension of its input, but the input has shape "
                f"{tuple(x.shape)} and the {name} {tuple(parameter.shape)}."
            )
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{kind} works on float32, bfloat16, float16 and float64, not on {x.dtype}.")
        if parameter.dtype not in (x.dtype, torch.float32) or parameter.dtype != weight.dtype:
            raise ValueError(
                f"{kind}'s {name} must have its input's dtype {x.dtype} or be float32, as all its parameters, not "
                f"{parameter.dtype}."
            )


class _Norm(torch.autograd.Function):
    # The raw operators have no autograd of their own: called on tensors that require gradients they would drop them in
    # silence.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, reciprocal = torch.ops.megallm.norm_forward(x, residual, weight, bias, epsilon, centred)
        if residual is None:
            total = x
        ctx.save_for_backward(total, weight, mean, reciprocal)
        ctx.centred, ctx.has_residual, ctx.has_bias = centred, residual is not None, bias is not None
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, mean, reciprocal = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros_like(total)
        grad_x, grad_parameters = torch.ops.megallm.norm_backward(
            grad_y, total, weight, mean, reciprocal, grad_total, ctx.centred
        )
        grad_residual, grad_bias = grad_x if ctx.has_residual else None, grad_parameters[1] if ctx.has_bias else None
        # As wide as their sums: autograd rounds them, unless the parameters' `grad_dtype` takes them as they are.
        return grad_x, grad_residual, grad_parameters[0], grad_bias, None, None


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, wide = x.shape[:-1].numel(), _accumulation_dtype(x.dtype)
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    mean = x.new_empty(rows if centred else 0, dtype=wide)
    return x.new_empty(x.shape), total, mean, x.new_empty(rows, dtype=wide)


def _fake_backward(
    grad_output: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    reciprocal: Tensor,
    grad_total: Tensor | None,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    wide = _accumulation_dtype(total.dtype)
    return total.new_empty(total.shape), total.new_empty(2 if centred else 1, total.shape[-1], dtype=wide)


register_fakes({"norm_forward": _fake_forward, "norm_backward": _fake_backward})
