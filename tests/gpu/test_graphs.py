"""A layer's forward and backward pass, captured once and replayed: the host takes no part in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.config.operators import OperatorChoices
from megallm.data_parallel.reducer import GradientReducer
from megallm.layers.context import LayoutContext
from megallm.mesh import Mesh, MeshShape
from megallm.model.gpt import GPTStage
from tests.distributed.parity import GPT, LLAMA, Case
from tests.distributed.parity_cases import DROPOUT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Layer:
    """A layer with what it needs to run as in training, and fixed places for what goes in and what comes out."""

    def __init__(self, features: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        config = resolve(build(Case("", features).settings()), 1)
        context = LayoutContext(Mesh(MeshShape(), 0, device).tp, False, dtype, device, seed=1)
        self.stage = GPTStage(config, range(1), context, is_first=False, is_last=False)
        self.stage.initialize()
        self.reducer = GradientReducer(
            {0: self.stage},
            Mesh(MeshShape(), 0, device),
            context.weight_gradients,
            bucket_elements=10**9,
            sharded=False,
            overlap=False,
            operators=OperatorChoices(),
        )
        self.reducer.start_step(10**9)
        torch.manual_seed(0)
        shape = (config.data.seq_length, 2, config.model.hidden_size)
        self.hidden = torch.randn(shape, device=device).to(dtype).requires_grad_()
        self.gradient = torch.randn(shape, device=device).to(dtype)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        tokens = torch.zeros(2, shape[0], dtype=torch.int64, device=device)
        self.batch = {"tokens": tokens, "sample_ids": torch.arange(2, device=device)}

    def run(self) -> torch.Tensor:
        """The output; gradients are in `hidden.grad` and, added up, in the buckets."""
        self.hidden.grad = None
        (output,) = self.stage((self.hidden,), self.batch, self.step)
        output.backward(self.gradient)
        return output.detach()

    def change_inputs(self) -> None:
        with torch.no_grad():
            self.hidden.copy_(self.hidden.flip(0))
        self.gradient.mul_(0.5)
        self.step.add_(1)
        for bucket in self.reducer.buckets:
            bucket.gradient.zero_()

    def gradients(self) -> list[torch.Tensor]:
        assert self.hidden.grad is not None
        return [self.hidden.grad.clone(), *(bucket.gradient.clone() for bucket in self.reducer.buckets)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [LLAMA, GPT | DROPOUT], ids=["llama", "gpt with dropout"])
def test_a_captured_layer_computes_what_it_does_by_itself(features: dict[str, Any], dtype: torch.dtype) -> None:
    layer = Layer(features, dtype, torch.device("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.run()  # libraries set up what they need
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer.run()
    captured = layer.hidden.grad
    layer.change_inputs()
    graph.replay()
    assert layer.hidden.grad is captured
    found = [output.clone(), *layer.gradients()]
    for bucket in layer.reducer.buckets:
        bucket.gradient.zero_()
    expected = [layer.run(), *layer.gradients()]
    for left, right in zip(found, expected, strict=True):
        assert right.any()
        torch.testing.assert_close(left, right)
