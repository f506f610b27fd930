"""What activations, softmax and dropout compute, refuse and keep, beside the rule on all operators."""

import pytest
import torch
import torch.nn.functional as F

from megallm import ops
from megallm.ops.library import NATIVE
from megallm.random import keep_mask, stream_key


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


@pytest.mark.skipif(not NATIVE.in_use, reason=f"native operators: {NATIVE.reason}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [ops.gelu, ops.gelu_tanh])
def test_activations_of_infinity_are_infinite(activation, dtype):
    x = torch.tensor([float("inf"), float("nan"), 3e4, 0.0], dtype=dtype)
    found = activation(x, None, "native")
    assert found[0] == float("inf") and found[1].isnan() and torch.equal(found[2:], x[2:])


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


MASKS = [None, padding(2, 7, [7, 3]), torch.rand(2, 1, 5, 7) < 0.4, torch.rand(5, 7) < 0.4, torch.rand(3, 5, 1) < 0.4]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=["none", "padding", "of a batch", "for all", "of queries"])
def test_softmax_with_masks_and_biases_that_are_stretched(mask, causal):
    torch.manual_seed(0)
    scores = (torch.randn(2, 3, 5, 7, dtype=torch.float64) * 4).requires_grad_()
    bias = None if mask is None else torch.randn(mask.shape, dtype=torch.float64).requires_grad_()
    leaves = (scores,) if bias is None else (scores, bias)
    grad_output = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    found, expected = (
        ops.scaled_masked_softmax(scores, mask, 0.3, causal, bias=bias, implementation=choice)
        for choice in ("auto", "reference")
    )
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(each, leaves, grad_output) for each in (found, expected))
    torch.testing.assert_close(*gradients)


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


def test_softmax_refuses_what_does_not_fit():
    scores = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="must be bool"):
        ops.scaled_masked_softmax(scores, torch.zeros(2, 2), 1.0, False)
    with pytest.raises(ValueError, match="mask must broadcast"):
        ops.scaled_masked_softmax(scores, torch.zeros(2, 3, dtype=torch.bool), 1.0, False)
    with pytest.raises(ValueError, match="must have the dtype of the scores"):
        ops.scaled_masked_softmax(scores, None, 1.0, False, bias=torch.zeros(2, 2).double())
    with pytest.raises(ValueError, match="2 to 4 dims"):
        ops.scaled_masked_softmax(torch.zeros(2), None, 1.0, False)
    # As many as there are rows, in another order of dims.
    dropout = ops.Dropout(0.5, stream_key(1, "x"), torch.tensor(0), torch.arange(24).view(3, 2, 4))
    with pytest.raises(ValueError, match="number for each row"):
        ops.scaled_masked_softmax(torch.zeros(2, 3, 4, 4), None, 1.0, True, dropout=dropout)


def test_softmax_counts_minus_infinity_as_masked():
    scores = torch.tensor([[[[1.0, -torch.inf], [-torch.inf, -torch.inf]]]], requires_grad=True)
    for implementation in ("auto", "reference"):
        probabilities = ops.scaled_masked_softmax(scores, None, 2.0, False, implementation=implementation)
        assert probabilities.tolist() == [[[[1, 0], [0, 0]]]]
        (grad,) = torch.autograd.grad(probabilities, scores, torch.ones_like(scores))
        assert grad.tolist() == [[[[0, 0], [0, 0]]]]


def test_dropout_drops_what_megallm_random_says():
    """The bits, of both operators, in both implementations, whatever the columns begin with."""
    key, step, rows = stream_key(4, "name"), torch.tensor(9), torch.arange(6).view(2, 3) * 2**33
    dropout = ops.Dropout(0.3, key, step, rows)
    keep = keep_mask(key, step, rows, 0, 1041, 0.3)
    for implementation in ("auto", "reference"):
        x = torch.ones(2, 3, 1041)
        assert torch.equal(ops.dropout_add(x, dropout, implementation=implementation) != 0, keep)
        weights = ops.scaled_masked_softmax(x, None, 1.0, False, dropout=dropout, implementation=implementation)
        assert torch.equal(weights != 0, keep)


def test_dropout_refuses_what_does_not_fit():
    x, dropout = torch.ones(2, 3), ops.Dropout(0.5, stream_key(1, "x"), torch.tensor(0), torch.arange(2))
    with pytest.raises(ValueError, match="bias must be as long as"):
        ops.dropout_add(x, dropout, torch.ones(2))
    with pytest.raises(ValueError, match="residual must be like"):
        ops.dropout_add(x, dropout, residual=x.double())
    with pytest.raises(ValueError, match="number for each row"):
        ops.dropout_add(x.t(), dropout)


@pytest.mark.skipif(not NATIVE.in_use, reason=f"native operators: {NATIVE.reason}")
def test_dropout_keeps_no_mask():
    x, dropout = (
        torch.ones(4, 64, requires_grad=True),
        ops.Dropout(0.5, stream_key(1, "x"), torch.tensor(0), torch.arange(4)),
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.dropout_add(x, dropout)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in dropout[1:]]


def test_layer_norm_mixed_dtypes_and_refusal():
    y = ops.layer_norm(torch.randn(2, 4).bfloat16(), torch.ones(4), torch.zeros(4), 1e-5)
    assert y.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a bias as long as"):
        ops.layer_norm(torch.ones(2, 4), torch.ones(4), torch.zeros(3), 1e-5)
