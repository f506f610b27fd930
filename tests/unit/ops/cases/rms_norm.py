import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megallm.ops.rms_norm import rms_norm, rms_norm_reference
from tests.unit.ops.accuracy import DTYPES, Case, Inputs

EPSILON = 1e-5


def make(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.25,
        "weight": torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5,
    }


def terms(inputs: Inputs, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """A term of the weight's gradient counts twice: it is the product of a rounded product."""
    x, weight = inputs["x"], inputs["weight"]
    reciprocal = (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    normalised, grad = x * reciprocal, grads[0] * weight
    projection = normalised * (grad * normalised).mean(-1, keepdim=True)
    products = (grads[0] * normalised).reshape(-1, x.shape[-1])
    return {"grad_x": reciprocal * (grad.abs() + projection.abs()), "grad_weight": 2 * products.abs().sum(0)}


CASES = [
    Case(
        "rms_norm",
        "rms_norm",
        make,
        lambda inputs, implementation: rms_norm(inputs["x"], inputs["weight"], EPSILON, implementation),
        shared=frozenset({"weight"}),
        wide=frozenset({"weight"}),
        terms=terms,
    )
]


def check_raw_operators(device: str) -> None:
    """No weight, an offset added to it, and a residual's gradient that is added before the rounding."""
    operators = torch.ops.megallm
    for dtype, width in itertools.product(DTYPES, (40, 4097)):
        inputs = CASES[0].inputs((19, width), dtype, device)
        x, weight = inputs["x"], inputs["weight"]
        grad_output = CASES[0].output_gradients(inputs)[0]
        residual = grad_output.flip(0)
        y, reciprocal = operators.rms_norm_forward(x, weight, EPSILON, 1.0)
        grad_x, grad_weight = operators.rms_norm_backward(grad_output, x, weight, reciprocal, residual, 1.0)
        leaves = x.double().requires_grad_(), (weight.double() + 1).requires_grad_()
        exact_y = rms_norm_reference(*leaves, EPSILON)
        exact = torch.autograd.grad(exact_y, leaves, grad_output.double())
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name, found, truth, target in (
            ("y", y, exact_y, dtype),
            ("grad_x", grad_x, exact[0] + residual.double(), dtype),
            ("grad_weight", grad_weight, exact[1], wide),
        ):
            error, ulp = (found.double() - truth).abs().max(), torch.finfo(target).eps
            assert found.dtype == target, name
            assert error <= 8 * ulp * truth.abs().max(), f"{name} {dtype} {width}: {error:.3e}"
        y, reciprocal = operators.rms_norm_forward(x, None, EPSILON, 1.0)
        ones = torch.ones(width, dtype=dtype, device=device)
        assert torch.equal(y, operators.rms_norm_forward(x, ones, EPSILON, 0.0)[0])
        grad_x, grad_weight = operators.rms_norm_backward(grad_output, x, None, reciprocal, None, 1.0)
        assert grad_weight.shape == (0,)
        assert torch.equal(grad_x, operators.rms_norm_backward(grad_output, x, ones, reciprocal, None, 0.0)[0])
