import torch
from torch import Tensor

from megallm.ops.accumulate import accumulate
from tests.unit.ops.accuracy import Case, Inputs


def make(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    return {"source": torch.randn(shape, generator=generator, dtype=torch.float64)}


def add(inputs: Inputs, implementation: str) -> Tensor:
    source = inputs["source"]
    target = torch.full(source.shape, 3.0, dtype=torch.float64, device=source.device)
    target = target if source.dtype == torch.float64 else target.float()
    accumulate(target, source, 0.75, implementation)
    return target


CASES = [Case("accumulate", "accumulate", make, add, fixed=frozenset({"source"}))]
