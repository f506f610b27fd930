"""Accumulation of gradients where they are kept, in a dtype that is wide enough for their sum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megallm.ops.library import NATIVE, register_fakes

__all__ = ["accumulate", "accumulate_reference", "accumulate_weight_gradient"]


@torch.no_grad()
def accumulate(target: Tensor, source: Tensor, scale: float = 1.0, implementation: str = "auto") -> None:
    """target += scale * source, in place, for one shape.

    `target` is float32 or float64, `source` of its dtype or, for a float32 target, bfloat16 or float16. Products and
    sums are those of the target's dtype, and no wide copy of the source is made.
    """
    if NATIVE.serves("accumulate", target, implementation) and target.is_contiguous() and _has_type_for(source, target):
        torch.ops.megallm.accumulate_(target, source.contiguous(), scale)
        increment_version(target)
        return
    accumulate_reference(target, source, scale)


def accumulate_reference(target: Tensor, source: Tensor, scale: float = 1.0) -> None:
    """The same in plain torch."""
    target.add_(source, alpha=scale)


def _has_type_for(source: Tensor, target: Tensor) -> bool:
    sixteen = target.dtype == torch.float32 and source.dtype in (torch.bfloat16, torch.float16)
    return source.dtype == target.dtype or sixteen


@torch.no_grad()
def accumulate_weight_gradient(
    gradient: Tensor, grad_output: Tensor, input: Tensor, implementation: str = "auto"
) -> None:
    """gradient += grad_output.T @ input, in place.

    gradient [out, in], float32 or float64; grad_output [tokens, out] and input [tokens, in] of one dtype. Where dtypes
    agree, and on GPUs also for 16-bit factors, the sum happens inside the matrix product and the product never exists
    by itself. On a CPU a 16-bit product exists, rounded, and is then accumulated as `implementation` says.
    """
    if gradient.dtype == input.dtype:
        gradient.addmm_(grad_output.t(), input)
    elif gradient.is_cuda:
        torch.addmm(gradient, grad_output.t(), input, out_dtype=gradient.dtype, out=gradient)
    else:
        accumulate(gradient, grad_output.t().matmul(input), implementation=implementation)


def _fake_accumulate(target: Tensor, source: Tensor, scale: float) -> None:
    return None


register_fakes({"accumulate_": _fake_accumulate})
