from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megallm.ops.norm import layer_norm, norm_of_sum, rms_norm
from tests.unit.ops.accuracy import QUICK_SHAPES, SHAPES, Case, Inputs

EPSILON = 1e-5
PARAMETERS = frozenset({"weight", "bias"})
LONG = ((3, 1), (5, 4096), (2, 65537))


def make(*, bias: bool, residual: bool) -> Callable[[tuple[int, ...], torch.Generator], Inputs]:
    def inputs(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
        made = {
            "x": torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.25,
            "weight": torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5,
        }
        if bias:
            made["bias"] = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
        if residual:
            made["residual"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made

    return inputs


def terms_of(kind: str) -> Callable[..., dict[str, Tensor]]:
    """What the gradients are differences and sums of, and for a LayerNorm y too: a row may be nearly constant.

    A term of the weight's gradient counts twice: it is the product of a rounded product.
    """

    def terms(inputs: Inputs, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        total, weight = inputs["x"], inputs["weight"]
        if "residual" in inputs:
            total = total + inputs["residual"]
        centred = total - total.mean(-1, keepdim=True) if kind == "LayerNorm" else total
        reciprocal = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        normalised, grad = centred * reciprocal, grads[0] * weight
        parts = grad.abs() + (normalised * (grad * normalised).mean(-1, keepdim=True)).abs()
        if kind == "LayerNorm":
            parts = parts + grad.mean(-1, keepdim=True).abs()
        # Where the row is nearly constant, the rounding of its values and of their mean is all that is left.
        noise = reciprocal * total.abs().amax(-1, keepdim=True).expand_as(total)
        grad_total = reciprocal * parts * (1 + (noise if kind == "LayerNorm" else 0))
        if len(grads) > 1:
            grad_total = grad_total + grads[1].abs()
        products = (grads[0] * normalised).abs()
        if kind == "LayerNorm":
            products = products + grads[0].abs() * noise
        found = {
            "grad_x": grad_total,
            "grad_residual": grad_total,
            "grad_weight": 2 * products.reshape(-1, total.shape[-1]).sum(0),
            "grad_bias": 2 * grads[0].abs().reshape(-1, total.shape[-1]).sum(0),
        }
        if kind == "LayerNorm":
            found["y0"] = (normalised.abs() + noise) * weight + (inputs["bias"].abs() if "bias" in inputs else 0)
        return found

    return terms


def alone(kind: str, *, bias: bool) -> Case:
    def call(inputs: Inputs, implementation: str) -> Tensor:
        if kind == "RMSNorm":
            return rms_norm(inputs["x"], inputs["weight"], EPSILON, implementation)
        return layer_norm(inputs["x"], inputs["weight"], inputs.get("bias"), EPSILON, implementation)

    operator = {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm"}[kind]
    name = operator if bias or kind == "RMSNorm" else f"{operator} without bias"
    return Case(
        name,
        operator,
        make(bias=bias, residual=False),
        call,
        shared=PARAMETERS,
        wide=PARAMETERS,
        terms=terms_of(kind),
        shapes=SHAPES if bias or kind == "RMSNorm" else (*SHAPES[::3], *LONG),
    )


def of_sum(kind: str, *, residual: bool) -> Case:
    bias = kind == "LayerNorm"

    def call(inputs: Inputs, implementation: str) -> tuple[Tensor, Tensor]:
        return norm_of_sum(
            inputs["x"],
            inputs.get("residual"),
            inputs["weight"],
            inputs.get("bias"),
            EPSILON,
            kind,
            implementation,
        )

    operator = {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm"}[kind]
    return Case(
        f"{operator} of a sum" if residual else f"{operator} beside a residual",
        operator,
        make(bias=bias, residual=residual),
        call,
        shared=PARAMETERS,
        wide=PARAMETERS,
        terms=terms_of(kind),
        shapes=(*SHAPES[::2], *LONG),
        quick_shapes=QUICK_SHAPES[2:],
    )


CASES = [
    alone("RMSNorm", bias=False),
    alone("LayerNorm", bias=True),
    alone("LayerNorm", bias=False),
    *(of_sum(kind, residual=residual) for kind in ("RMSNorm", "LayerNorm") for residual in (True, False)),
]
