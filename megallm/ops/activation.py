"""Activation functions of the feed-forward layer, plain and gated (Shazeer 2020, arXiv:2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "geglu",
    "geglu_reference",
    "gelu",
    "gelu_tanh",
    "relu",
    "squared_relu",
    "swiglu",
    "swiglu_reference",
]


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x, by the error function."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its approximation by tanh, as GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for `gate_up` [..., 2 f], whose first half is the gate and second half the up projection.

    Returns [..., f]. Keeps only `gate_up` for the backward pass. Raises ValueError when the last dimension is odd.
    """
    _check_packed(gate_up)
    if torch.compiler.is_compiling():
        return swiglu_reference(gate_up)  # which the compiler fuses, and it cannot write into a slice
    return _SwiGLU.apply(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The same as a composition of differentiable torch operators."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, packed as in `swiglu`.

    GELU is its approximation by tanh: what the models with this gate were trained with (T5 1.1, Gemma).
    """
    _check_packed(gate_up)
    if torch.compiler.is_compiling():
        return geglu_reference(gate_up)  # which the compiler fuses, and it cannot write into a slice
    return _GeGLU.apply(gate_up)


def geglu_reference(gate_up: Tensor) -> Tensor:
    """The same as a composition of differentiable torch operators."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _check_packed(gate_up: Tensor) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 != 0:
        raise ValueError(
            f"Gate and up projection are two equal halves of the last dimension; {tuple(gate_up.shape)} has none."
        )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad, grad_gate, grad_up = _empty_halves(gate_up)
        torch.mul(grad_output, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
        return grad


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad, grad_gate, grad_up = _empty_halves(gate_up)
        torch.mul(grad_output, F.gelu(gate, approximate="tanh"), out=grad_up)
        torch.ops.aten.gelu_backward.grad_input(grad_output * up, gate, approximate="tanh", grad_input=grad_gate)
        return grad


def _empty_halves(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A contiguous tensor like `gate_up`, and its two halves to write into: no concatenation afterwards."""
    grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    return grad, grad_gate, grad_up
