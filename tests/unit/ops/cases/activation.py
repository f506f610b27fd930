from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megallm.ops import geglu, gelu, gelu_tanh, relu, squared_relu, swiglu
from tests.unit.ops.accuracy import QUICK_SHAPES, SHAPES, Case, Inputs

GATED = {"swiglu": swiglu, "geglu": geglu}
PLAIN = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "squared_relu": squared_relu}


def make(with_bias: bool, factor: int) -> Callable[[tuple[int, ...], torch.Generator], Inputs]:
    def inputs(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
        width = factor * shape[-1]
        made = {"x": 3 * torch.randn(*shape[:-1], width, generator=generator, dtype=torch.float64)}
        # Values far out in the tails, where the functions are nearly linear or nearly zero.
        made["x"].view(-1)[::7] *= 5
        if with_bias:
            made["bias"] = torch.randn(width, generator=generator, dtype=torch.float64)
        return made

    return inputs


def case(name: str, function: Callable[..., Tensor], with_bias: bool, gated: bool) -> Case:
    def terms(inputs: Inputs, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Both gradients are made of products of rounded products, which count twice; the bias's is a sum of them."""
        leaf = inputs["x"].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, inputs.get("bias"), "reference"), leaf, grads[0])
        return {"grad_x": 2 * gradient, "grad_bias": 2 * gradient.reshape(-1, gradient.shape[-1]).abs().sum(0)}

    return Case(
        f"{name} with bias" if with_bias else name,
        name,
        make(with_bias, 2 if gated else 1),
        lambda inputs, implementation: function(inputs["x"], inputs.get("bias"), implementation),
        shared=frozenset({"bias"}),
        shapes=SHAPES if with_bias else (*SHAPES[::2], (3, 1), (5, 4096), (2, 65537)),
        quick_shapes=QUICK_SHAPES if with_bias else QUICK_SHAPES[:3],
        terms=terms,
    )


CASES = [
    case(name, function, with_bias, name in GATED)
    for name, function in (GATED | PLAIN).items()
    for with_bias in (False, True)
]
