import torch
from torch import Tensor

from megallm.ops.sum_of_squares import sum_of_squares
from tests.unit.ops.accuracy import Case, Inputs


def make(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    return {"x": torch.randn(shape, generator=generator, dtype=torch.float64)}


def squares_of_rows(inputs: Inputs, implementation: str) -> Tensor:
    """Each row by itself, in two parts, the second of which begins anywhere: [rows, 1]."""
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1])  # [..., width] -> [rows, width]
    cut = x.shape[-1] // 3
    sums = [
        sum_of_squares([x[row, :cut].contiguous(), x[row].contiguous()[cut:]], x.device, implementation)
        for row in range(x.shape[0])
    ]
    return torch.stack(sums).unsqueeze(-1) if sums else x.new_empty(0, 1, dtype=torch.float64)


CASES = [
    Case(
        "sum_of_squares",
        "sum_of_squares",
        make,
        squares_of_rows,
        fixed=frozenset({"x"}),
        dtypes=(torch.float32, torch.float64),
    )
]
