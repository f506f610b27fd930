"""RMSNorm's CUDA operator, by the checks that the CPU's passes, and in what only a GPU has."""

import pytest
import torch

from megallm.ops.library import NATIVE
from megallm.ops.rms_norm import rms_norm, rms_norm_reference
from tests.unit.ops import accuracy

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not NATIVE.cuda_architectures, reason="built without CUDA operators"),
]


@pytest.mark.parametrize(
    "check",
    [
        accuracy.check_shapes,
        accuracy.check_views,
        accuracy.check_determinism,
        accuracy.check_non_finite,
        accuracy.check_raw_operators,
    ],
)
def test_as_on_the_cpu(check):
    check("cuda")


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, dtype=torch.float64, device="cuda", requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))


def test_compiles_as_one_graph():
    x, weight, grad_output = accuracy.random_inputs((6, 48), torch.bfloat16, "cuda")
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    expected = accuracy.gradients(rms_norm, x, weight.float(), grad_output)
    for left, right in zip(accuracy.gradients(compiled, x, weight.float(), grad_output), expected, strict=True):
        assert torch.equal(left, right)


def test_runs_on_the_current_stream_and_in_a_graph():
    x, weight, _ = accuracy.random_inputs((64, 4096), torch.bfloat16, "cuda")
    weight = weight.to(torch.bfloat16).requires_grad_()
    x.requires_grad_()

    def step():
        y = rms_norm(x, weight, 1e-5)
        return y, *torch.autograd.grad(y, (x, weight), x.detach())

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for left, right in zip(captured, step(), strict=True):
        assert torch.equal(left, right)


def test_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(8, 256, device="cuda:1")
    with torch.cuda.device(0):
        y = rms_norm(x, torch.ones(256, device="cuda:1"), 1e-5)
    torch.testing.assert_close(y, rms_norm_reference(x, torch.ones(256, device="cuda:1"), 1e-5))


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    width = 4096
    rows = 2**31 // width + 3
    if torch.cuda.mem_get_info()[0] < 5 * rows * width * 2:
        pytest.skip("not enough memory")
    x = torch.ones(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(width, device="cuda")
    x.requires_grad_()
    weight = torch.rand(width, device="cuda", requires_grad=True)
    y = rms_norm(x, weight, 1e-5)
    y.backward(x.detach())
    alone = x.detach()[-2:].requires_grad_()
    expected = rms_norm(alone, weight.detach(), 1e-5)
    expected.backward(alone.detach())
    assert torch.equal(y[-2:], expected)
    assert torch.equal(x.grad[-2:], alone.grad)
