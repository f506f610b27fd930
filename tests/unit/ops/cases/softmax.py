from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megallm.ops import Dropout, scaled_masked_softmax
from megallm.random import stream_key
from tests.unit.ops.accuracy import Case, Inputs

SCALE = 0.3
SHAPES = (
    (0, 8),
    (1, 1),
    (7, 3),
    (2, 3, 255),
    (33, 1000),
    (40, 1032),
    (1009, 24),
    (5, 4096),
    (3, 11008),
    (2, 65537),
    (2, 16392),
)
QUICK_SHAPES = ((0, 8), (7, 3), (2, 3, 255), (5, 1032))


def make_dropped(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    """A mask of a third of the keys, and of all of them in some rows; rows of dropout in no order."""
    mask = torch.rand(shape, generator=generator) < 0.35
    return {
        "scores": 4 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "mask": mask | (torch.rand(*shape[:-1], 1, generator=generator) < 0.2),
        "key": stream_key(3, "x"),
        "step": torch.tensor(5),
        "rows": torch.randint(0, 2**40, shape[:-1], generator=generator),
    }


def make_scores(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    return {"scores": 4 * torch.randn(shape, generator=generator, dtype=torch.float64)}


def make_biased(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    bias = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"bias": bias, **make_scores(shape, generator)}


def matrices(inputs: Inputs) -> Tensor:
    """Each row as the scores of some queries: [rows, queries, keys], of which there may be fewer."""
    width = inputs["scores"].shape[-1]
    queries = next(count for count in (4, 3, 5, 17, 1) if width % count == 0)
    return inputs["scores"].unflatten(-1, (queries, width // queries))


def dropped(inputs: Inputs, implementation: str) -> Tensor:
    dropout = Dropout(0.25, inputs["key"], inputs["step"], inputs["rows"])
    return scaled_masked_softmax(
        inputs["scores"], inputs["mask"], SCALE, False, dropout=dropout, implementation=implementation
    )


def biased(inputs: Inputs, implementation: str) -> Tensor:
    return scaled_masked_softmax(
        inputs["scores"], None, SCALE, False, bias=inputs["bias"], implementation=implementation
    )


def causal(inputs: Inputs, implementation: str) -> Tensor:
    return scaled_masked_softmax(matrices(inputs), None, SCALE, True, implementation=implementation).flatten(-2)


def terms_of(call: Callable[[Inputs, str], Tensor]) -> Callable[..., dict[str, Tensor]]:
    """The gradient is the product of a rounded probability and a difference; both its terms count twice."""

    def terms(inputs: Inputs, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        probabilities = call(inputs, "reference")
        weighted = (probabilities * grads[0]).abs()
        size = 2 * (weighted + probabilities * weighted.sum(-1, keepdim=True))
        return {"grad_scores": SCALE * size, "grad_bias": size}

    return terms


CASES = [
    Case(
        "softmax masked, with dropout",
        "softmax",
        make_dropped,
        dropped,
        shared=frozenset({"key", "step"}),
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        terms=terms_of(dropped),
    ),
    Case(
        "softmax with a bias",
        "softmax",
        make_biased,
        biased,
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES[1:3],
        terms=terms_of(biased),
    ),
    Case(
        "softmax causal",
        "softmax",
        make_scores,
        causal,
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES[:3],
        terms=terms_of(causal),
    ),
]
