"""Accumulation of weight gradients where they are kept."""

from __future__ import annotations

import torch


def accumulate_weight_gradient(gradient: torch.Tensor, grad_output: torch.Tensor, input: torch.Tensor) -> None:
    """gradient += grad_output.T @ input, in place.

    gradient [out, in], float32 or float64; grad_output [tokens, out] and input [tokens, in] of one dtype. Where dtypes
    agree, and on GPUs also for 16-bit factors, the sum happens inside the matrix product and the product never exists
    by itself.
    """
    if gradient.dtype == input.dtype:
        gradient.addmm_(grad_output.t(), input)
    elif gradient.is_cuda:
        torch.addmm(gradient, grad_output.t(), input, out_dtype=gradient.dtype, out=gradient)
    else:
        gradient.add_(grad_output.t().matmul(input))
