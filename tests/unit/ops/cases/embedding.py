import torch
from torch import Tensor

from megallm.ops.embedding import accumulate_rows, add_rows
from tests.unit.ops.accuracy import Case, Inputs

ENTRIES = 7


def make_addition(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(shape, generator=generator, dtype=torch.float64),
        "table": torch.randn(ENTRIES, shape[-1], generator=generator, dtype=torch.float64),
        "rows": torch.randint(0, ENTRIES, shape[:-1], generator=generator),
    }


def make_gradient(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    """Rows -2 and -1 are left out."""
    rows = torch.randint(-2, ENTRIES, shape[:-1], generator=generator)
    return {"gradient": torch.randn(shape, generator=generator, dtype=torch.float64), "rows": rows}


def accumulated(inputs: Inputs, implementation: str) -> Tensor:
    """Each row of the result is one element of the table that got it, so that rows stay rows.

    The table has as many entries for each row of the gradient: [rows, entries x width].
    """
    gradient, rows = inputs["gradient"], inputs["rows"]
    count, width = rows.numel(), gradient.shape[-1]
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    target = torch.full((count * ENTRIES, width), 0.5, dtype=wide, device=gradient.device)
    own = torch.arange(count, device=rows.device).view(rows.shape) * ENTRIES + rows
    numbers = torch.where(rows < 0, -1, own)
    accumulate_rows(target, gradient, numbers, implementation)
    # Twice each, in two places of the order: what is equal is summed in its order.
    accumulate_rows(target, torch.cat((gradient * 0.5, gradient * 0.25)), torch.cat((numbers, numbers)), implementation)
    return target.view(*rows.shape, ENTRIES * width)


def summed(gradient: Tensor, inputs: Inputs) -> Tensor:
    """[..., width] -> [entries, width], the sums of equal rows."""
    numbers = inputs["rows"].reshape(-1)
    total = gradient.new_zeros(ENTRIES, gradient.shape[-1])
    return total.index_add(0, numbers, gradient.reshape(-1, gradient.shape[-1]))


CASES = [
    Case(
        "add_rows",
        "add_rows",
        make_addition,
        lambda inputs, implementation: add_rows(inputs["x"], inputs["table"], inputs["rows"], implementation),
        shared=frozenset({"table"}),
        terms=lambda inputs, grads: {"grad_table": 2 * summed(grads[0].abs(), inputs)},
    ),
    Case("embedding_gradient", "embedding_gradient", make_gradient, accumulated, fixed=frozenset({"gradient"})),
]
