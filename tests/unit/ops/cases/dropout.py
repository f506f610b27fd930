from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megallm.ops import Dropout, dropout_add
from megallm.random import stream_key
from tests.unit.ops.accuracy import Case, Inputs

SHAPES = ((0, 8), (1, 1), (7, 3), (131, 100), (2, 3, 255), (40, 1032), (1009, 24), (5, 4096), (3, 11008), (2, 65537))
QUICK_SHAPES = ((0, 8), (7, 3), (2, 3, 255), (5, 1032))


def make(*, added: bool) -> Callable[[tuple[int, ...], torch.Generator], Inputs]:
    def inputs(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
        made = {
            "x": torch.randn(shape, generator=generator, dtype=torch.float64),
            "key": stream_key(3, "x"),
            "step": torch.tensor(5),
            "rows": torch.randint(0, 2**40, shape[:-1], generator=generator),
        }
        if added:
            made["bias"] = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
            made["residual"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made

    return inputs


def call(inputs: Inputs, implementation: str) -> Tensor:
    dropout = Dropout(0.25, inputs["key"], inputs["step"], inputs["rows"])
    return dropout_add(inputs["x"], dropout, inputs.get("bias"), inputs.get("residual"), implementation)


def terms(inputs: Inputs, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the sums are of; those over rows of products that are rounded."""
    parts = {name: tensor.abs() for name, tensor in inputs.items() if tensor.is_floating_point()}
    size = (parts["x"] + parts["bias"]) / 0.75 + parts["residual"] if "bias" in parts else parts["x"] / 0.75
    return {"y0": size, "grad_bias": 2 * grads[0].abs().reshape(-1, size.shape[-1]).sum(0) / 0.75}


CASES = [
    Case(
        "bias, dropout and residual",
        "dropout_add",
        make(added=True),
        call,
        shared=frozenset({"bias", "key", "step"}),
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        terms=terms,
    ),
    Case(
        "dropout",
        "dropout_add",
        make(added=False),
        call,
        shared=frozenset({"key", "step"}),
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES[:3],
    ),
]
