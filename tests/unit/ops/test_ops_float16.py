"""float16 ends at 65504: what operators compute on the way to a result that fits must not stop there."""

from __future__ import annotations

import pytest
import torch

from megallm import ops
from megallm.communication import Group, Transport
from megallm.layers.attention import attend
from megallm.layers.embedding import vocabulary_cross_entropy
from megallm.ops.cross_entropy import CrossEntropy
from megallm.ops.norm import rms_norm_reference
from megallm.random import stream_key

ALONE = Group((0,), 0, Transport(None))


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.isfinite(found).all()
    bound = 2.0**-9 * exact.abs().max()
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("norm", [ops.rms_norm, rms_norm_reference])
def test_rms_norm_of_large_values(norm) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 64) * 1e4).half()
    weight = torch.randn(64).half()
    assert_close(norm(x, weight, 1e-5), norm(x.double(), weight.double(), 1e-5))


def test_layer_norm_of_large_values() -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 64) * 1e4).half()
    weight, bias = torch.randn(64).half(), torch.randn(64).half()
    exact = ops.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    assert_close(ops.layer_norm(x, weight, bias, 1e-5), exact)


@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("with_dropout", [False, True], ids=["plain", "dropout"])
def test_attention_whose_unscaled_scores_overflow(documents: bool, with_dropout: bool) -> None:
    """Products of up to 130000 times 1 / 8."""
    torch.manual_seed(0)
    query, key = (45 * torch.randn(2, 2, 6, 64).sign().half() for _ in range(2))
    key = query + 0.25 * torch.randn_like(query)
    value = torch.randn(2, 2, 6, 64).half()
    allowed = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone() if documents else None
    if allowed is not None:
        allowed[:, :, 3:, :3] = False
    dropout = None
    if with_dropout:
        rows = torch.arange(2 * 2 * 6).view(2, 2, 6)
        dropout = ops.Dropout(0.1, stream_key(1, "dropout", torch.device("cpu")), torch.tensor(0), rows)
    assert query.double().matmul(key.double().transpose(-2, -1)).max() > 1e5
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, exact = attend(*inputs, allowed, dropout), attend(*wide, allowed, dropout)
    assert_close(found, exact)
    gradient = torch.randn_like(found)
    for half, want in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(exact, wide, gradient.double()), strict=True
    ):
        assert torch.isfinite(half).all()
        assert (half.double() - want).norm() <= 2.0**-6 * want.norm() + 1e-3


def test_cross_entropy_of_large_logits_and_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 100_000).half()
    logits[0, 0, 5] = 60_000.0
    targets = torch.tensor([[5, 0], [1, 2], [3, 99_999]])
    wide = logits.double().requires_grad_()
    exact = vocabulary_cross_entropy(wide.clone(), targets, CrossEntropy(100_000), ALONE).objective
    losses = vocabulary_cross_entropy(logits.requires_grad_().clone(), targets, CrossEntropy(100_000), ALONE).objective
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), exact, rtol=1e-5, atol=1e-6)
    # Scaled, as a loss scale does it: by itself what most words get lies below 2^-24.
    (gradient,) = torch.autograd.grad(losses.sum() * 1e4, logits)
    (want,) = torch.autograd.grad(exact.sum() * 1e4, wide)
    assert_close(gradient, want)
    assert (gradient != 0).double().mean() > 0.6, "words that are not the target pull the logits too"
