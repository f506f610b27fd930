"""Activation functions of the feed-forward layer, plain and gated (Shazeer 2020, arXiv:2002.05202).

Each takes what a linear layer computed, and that layer's bias if it has one, which is then added on the way. The native
operators keep nothing but their input for the backward pass, round each result once, and sum the bias's gradient over
the rows in a fixed order. Not differentiable twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megallm.ops.library import NATIVE, register_fakes

__all__ = ["geglu", "gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"]


def gelu(x: Tensor, bias: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """x + bias times the normal distribution function there, by the error function.

    `x` [..., width] is float32, bfloat16, float16 or float64 and may be a slice of a packed tensor, `bias` [width] has
    its dtype. Raises ValueError when the shapes or dtypes do not fit.
    """
    return _apply(x, bias, "gelu", "gelu", implementation)


def gelu_tanh(x: Tensor, bias: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """GELU in its approximation by tanh, as GPT-2 was trained with; arguments as in `gelu`."""
    return _apply(x, bias, "gelu_tanh", "gelu_tanh", implementation)


def relu(x: Tensor, bias: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """max(x + bias, 0); arguments as in `gelu`."""
    return _apply(x, bias, "relu", "relu", implementation)


def squared_relu(x: Tensor, bias: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """max(x + bias, 0)^2 (So et al. 2021, arXiv:2109.08668); arguments as in `gelu`."""
    return _apply(x, bias, "squared_relu", "squared_relu", implementation)


def swiglu(gate_up: Tensor, bias: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """silu(gate) * up for `gate_up` [..., 2 f], whose first half is the gate and second half the up projection.

    `bias` [2 f] is added to both before. Returns [..., f]. Raises ValueError when the last dimension is odd or the bias
    does not fit.
    """
    return _apply(gate_up, bias, "swiglu", "silu", implementation, gated=True)


def geglu(gate_up: Tensor, bias: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """gelu(gate) * up, packed as in `swiglu`.

    GELU is its approximation by tanh: what the models with this gate were trained with (T5 1.1, Gemma).
    """
    return _apply(gate_up, bias, "geglu", "gelu_tanh", implementation, gated=True)


def _apply(
    x: Tensor, bias: Tensor | None, operator: str, activation: str, implementation: str, gated: bool = False
) -> Tensor:
    if gated and (x.dim() == 0 or x.shape[-1] % 2 != 0):
        raise ValueError(
            f"Gate and up projection are two equal halves of the last dimension; {tuple(x.shape)} has none."
        )
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype):
        raise ValueError(
            f"The bias must be as long as the last dimension of the input and have its dtype, but the input is "
            f"{x.dtype} {tuple(x.shape)} and the bias {bias.dtype} {tuple(bias.shape)}."
        )
    if NATIVE.serves(operator, x, implementation):
        return _Activation.apply(x, bias, activation, gated)
    return activation_reference(x, bias, activation, gated)


def activation_reference(x: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """All of them in plain torch, as a composition of differentiable operators."""
    if bias is not None:
        x = x + bias
    if not gated:
        return _plain(x, activation)
    gate, up = x.chunk(2, dim=-1)
    return _plain(gate, activation) * up


def _plain(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if activation == "relu" else F.relu(x).square()


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.activation, ctx.gated = activation, gated
        return torch.ops.megallm.activation_forward(x, bias, activation, gated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, bias = ctx.saved_tensors
        grad_x, grad_bias = torch.ops.megallm.activation_backward(grad_output, x, bias, ctx.activation, ctx.gated)
        # As wide as its sum: autograd rounds it, unless the bias's `grad_dtype` takes it as it is.
        return grad_x, None if bias is None else grad_bias, None, None


def _fake_forward(x: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // (2 if gated else 1))


def _fake_backward(
    grad_output: Tensor, x: Tensor, bias: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[-1], dtype=wide)


register_fakes({"activation_forward": _fake_forward, "activation_backward": _fake_backward})
