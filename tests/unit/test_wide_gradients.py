"""Gradients of 16-bit norm weights, biases and added tables reach their bucket unrounded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from megallm.communication import Group, Transport
from megallm.config.operators import OperatorChoices
from megallm.data_parallel.reducer import GradientReducer
from megallm.layers.context import LayoutContext
from megallm.layers.norm import Norm, NormSettings
from megallm.mesh import Mesh, MeshShape
from megallm.ops import Dropout, dropout_add, gelu
from megallm.ops.embedding import add_rows
from megallm.ops.library import NATIVE
from megallm.parameter import Description, make_parameter, whole
from megallm.random import stream_key

ROWS, WIDTH = 37, 24
CPU = torch.device("cpu")


class Biased(nn.Module):
    """Something of x [rows, width] and a bias."""

    def __init__(self, context: LayoutContext, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.bias = make_parameter(Description((whole("bias", (WIDTH,)),), decays=False), context.dtype, CPU)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.bias)


def dropped(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return dropout_add(x, Dropout(0.5, stream_key(1, "x"), torch.tensor(0), torch.arange(ROWS)), bias)


class Added(nn.Module):
    """Rows of a table added to x [rows, width], by the operator alone: no layer that hands the gradient elsewhere."""

    def __init__(self, context: LayoutContext) -> None:
        super().__init__()
        self.table = make_parameter(Description((whole("table", (3, WIDTH)),), decays=False), context.dtype, CPU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return add_rows(x, self.table, torch.arange(ROWS) % 3)


MODULES: dict[str, Callable[[LayoutContext], nn.Module]] = {
    "RMSNorm": lambda context: Norm("norm", NormSettings("RMSNorm", 1e-5), WIDTH, context),
    "LayerNorm": lambda context: Norm("norm", NormSettings("LayerNorm", 1e-5), WIDTH, context),
    "activation": partial(Biased, function=gelu),
    "dropout": partial(Biased, function=dropped),
    "table": Added,
}


def bucket_gradient(make: Callable[[LayoutContext], nn.Module], dtype: torch.dtype) -> torch.Tensor:
    """Of two micro-batches, the same numbers in any dtype."""
    context = LayoutContext(Group((0,), 0, Transport(None)), False, dtype, CPU, seed=1)
    module = make(context)
    for name, parameter in module.named_parameters():
        nn.init.constant_(parameter, float(name == "weight"))
    settings: dict[str, Any] = {"bucket_elements": 10**6, "sharded": False, "overlap": False}
    mesh = Mesh(MeshShape(), 0, CPU)
    reducer = GradientReducer({0: module}, mesh, context.weight_gradients, operators=OperatorChoices(), **settings)
    reducer.start_step(2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x, gradient = (torch.randn(ROWS, WIDTH, generator=generator).bfloat16().to(dtype) for _ in range(2))
        module(x.requires_grad_()).backward(gradient)
    return torch.cat([bucket.gradient for bucket in reducer.buckets]).double()


@pytest.mark.skipif(not NATIVE.in_use, reason="plain torch rounds gradients to the dtype of what they are of")
@pytest.mark.parametrize("what", MODULES)
def test_sums_over_tokens_are_not_rounded_before_they_are_added_up(what: str) -> None:
    exact, found = (bucket_gradient(MODULES[what], dtype) for dtype in (torch.float64, torch.bfloat16))
    # A rounded sum would be wrong by some 1e-3. Activations of 16-bit numbers are computed to 2e-5 each.
    bound = 1e-5 if what == "activation" else 1e-6
    assert (found - exact).norm() <= bound * exact.norm()
