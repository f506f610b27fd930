"""Gated activations, softmax and LayerNorm against compositions of torch operators."""

import pytest
import torch
import torch.nn.functional as F

from megallm import ops
from megallm.ops.library import NATIVE
from megallm.ops.softmax import scaled_masked_softmax_reference
from tests.unit.ops.accuracy import assert_not_worse


def backward(function, x, grad_output):
    x = x.detach().requires_grad_()
    y = function(x)
    y.backward(grad_output)
    return y.detach(), x.grad


def check_against_reference(function, reference, x):
    """By the error rule in every dtype, and by gradcheck."""
    grad_output = torch.randn_like(function(x))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = backward(function, x.to(dtype), grad_output.to(dtype))
        eager = backward(reference, x.to(dtype), grad_output.to(dtype))
        truth = backward(reference, x.to(dtype).double(), grad_output.to(dtype).double())
        for name, *values in zip(("y", "grad"), found, eager, truth, strict=True):
            assert_not_worse(f"{name} {dtype}", *values)
    assert torch.autograd.gradcheck(function, (x.detach().requires_grad_(),))


@pytest.mark.parametrize("function", [ops.swiglu, ops.geglu])
def test_gated_activations_refuse_what_has_no_halves(function):
    with pytest.raises(ValueError, match="two equal halves"):
        function(torch.ones(3, 7))


@pytest.mark.parametrize("bias", [torch.ones(4), torch.ones(8).double()])
def test_activations_refuse_a_bias_that_does_not_fit(bias):
    with pytest.raises(ValueError, match="bias must be as long as"):
        ops.gelu(torch.ones(3, 8), bias)


@pytest.mark.skipif(not NATIVE.in_use, reason=f"native operators: {NATIVE.reason}")
@pytest.mark.parametrize("function", [ops.swiglu, ops.geglu])
def test_gated_activations_keep_only_their_input(function):
    gate_up = torch.randn(4, 6, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function(gate_up)
    assert [tensor.data_ptr() for tensor in saved] == [gate_up.data_ptr()]


def test_gate_is_the_first_half():
    gate_up = torch.tensor([[0.0, 2.0, 5.0, 7.0]])
    assert ops.swiglu(gate_up)[0, 0] == 0
    torch.testing.assert_close(ops.swiglu(gate_up)[0, 1], 7 * F.silu(torch.tensor(2.0)))


def test_plain_activations():
    x = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    normal = 0.5 * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(ops.gelu(x), x * normal)
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(ops.gelu_tanh(x), 0.5 * x * (1 + torch.tanh(inner)))
    assert ops.relu(x).tolist() == [0, 0, 3]
    assert ops.squared_relu(x).tolist() == [0, 0, 9]
    (grad,) = torch.autograd.grad(ops.squared_relu(x).sum(), x)
    assert grad.tolist() == [0, 0, 6]


def padding(batch, keys, lengths):
    return torch.arange(keys) >= torch.tensor(lengths).view(batch, 1, 1, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, padding(2, 7, [7, 3]), torch.rand(2, 1, 5, 7) < 0.4, torch.rand(5, 7) < 0.4])
def test_softmax(mask, causal):
    torch.manual_seed(0)
    check_against_reference(
        lambda a: ops.scaled_masked_softmax(a, mask, 0.3, causal),
        lambda a: scaled_masked_softmax_reference(a, mask, 0.3, causal),
        torch.randn(2, 3, 5, 7, dtype=torch.float64) * 4,
    )


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 5)])
def test_softmax_causal_sees_the_past(queries, keys):
    probabilities = ops.scaled_masked_softmax(torch.zeros(1, 1, queries, keys), None, 1.0, True)
    for query in range(queries):
        seen = query + keys - queries + 1
        expected = [1 / seen] * seen + [0.0] * (keys - seen)
        torch.testing.assert_close(probabilities[0, 0, query], torch.tensor(expected))


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_softmax_of_masked_rows_is_zero_whatever_they_hold(value):
    scores = torch.full((2, 1, 3, 4), value, requires_grad=True)
    mask = padding(2, 4, [0, 4])
    probabilities = ops.scaled_masked_softmax(scores, mask, 1.0, False)
    assert torch.equal(probabilities[0], torch.zeros(1, 3, 4))
    assert bool(probabilities[1].isnan().all()) == (value != 1.0)
    (grad,) = torch.autograd.grad(probabilities, scores, torch.ones_like(probabilities))
    assert torch.equal(grad[0], torch.zeros(1, 3, 4))


def test_softmax_more_queries_than_keys_masks_the_first():
    probabilities = ops.scaled_masked_softmax(torch.randn(1, 1, 4, 2), None, 1.0, True)
    assert torch.equal(probabilities[0, 0, :2], torch.zeros(2, 2))
    torch.testing.assert_close(probabilities[0, 0, 2:].sum(-1), torch.ones(2))


def test_softmax_refuses_a_mask_of_numbers():
    with pytest.raises(ValueError, match="must be bool"):
        ops.scaled_masked_softmax(torch.zeros(1, 1, 2, 2), torch.zeros(2, 2), 1.0, False)


def test_layer_norm_mixed_dtypes_and_refusal():
    y = ops.layer_norm(torch.randn(2, 4).bfloat16(), torch.ones(4), torch.zeros(4), 1e-5)
    assert y.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a bias as long as"):
        ops.layer_norm(torch.ones(2, 4), torch.ones(4), torch.zeros(3), 1e-5)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda a: ops.scaled_masked_softmax(a, None, 0.5, True), torch.randn(1, 2, 3, 3)),
    ],
    ids=["softmax"],
)
def test_compiles_as_one_graph(function, x):
    grad_output = torch.randn_like(function(x))
    expected = backward(function, x, grad_output)
    found = backward(torch.compile(function, fullgraph=True, backend="aot_eager"), x, grad_output)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)
