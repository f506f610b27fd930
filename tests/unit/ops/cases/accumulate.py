from functools import partial

import torch
from torch import Tensor

from megallm.ops.accumulate import accumulate
from tests.unit.ops.accuracy import Case, Inputs


def make(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    return {"source": torch.randn(shape, generator=generator, dtype=torch.float64)}


def add(inputs: Inputs, implementation: str, offset: int) -> Tensor:
    """To a target whose address is off by `offset` elements."""
    source = inputs["source"]
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    flat = torch.full((source.numel() + offset,), 3.0, dtype=wide, device=source.device)
    target = flat[offset:].view(source.shape)
    accumulate(target, source, 0.75, implementation)
    return target


CASES = [
    Case(name, "accumulate", make, partial(add, offset=offset), fixed=frozenset({"source"}))
    for name, offset in (("accumulate", 0), ("accumulate off by one", 1))
]
