"""Output layer and loss in chunks of tokens: the numbers of the whole product, without its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megallm.communication import Group, Transport
from megallm.config.operators import OperatorChoices
from megallm.layers.chunked_loss import chunked_cross_entropy
from megallm.layers.context import LayoutContext
from megallm.layers.linear import column_parallel_linear
from megallm.ops.cross_entropy import CrossEntropy, TokenLosses, token_losses
from megallm.train.saved_bytes import SavedBytes

SEQUENCE, BATCH, HIDDEN, VOCABULARY, COLUMNS = 7, 3, 16, 23, 26
CPU = torch.device("cpu")


def context(dtype: torch.dtype = torch.float64, ops: str = "auto") -> LayoutContext:
    alone = Group((0,), 0, Transport(None))
    return LayoutContext(alone, False, dtype, CPU, seed=1, operators=OperatorChoices(ops))


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, nn.Parameter, nn.Parameter, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, bias, targets of which some are ignored, gradient of the losses."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    targets = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator).t()
    targets[2, 1] = targets[6] = -100
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = normal(SEQUENCE, BATCH, HIDDEN).requires_grad_()
    grad = normal(SEQUENCE, BATCH).to(wide)
    return hidden, nn.Parameter(normal(COLUMNS, HIDDEN)), nn.Parameter(normal(COLUMNS)), targets, grad


def whole(
    hidden: torch.Tensor,
    weight: nn.Parameter,
    targets: torch.Tensor,
    loss: CrossEntropy,
    layout: LayoutContext,
    bias: nn.Parameter | None = None,
) -> TokenLosses:
    logits = column_parallel_linear(hidden, weight, layout)
    return token_losses(logits if bias is None else logits + bias, targets, loss)


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize("chunk_size", [1, 5, 21, 100])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_chunks_compute_what_the_whole_does(chunk_size: int, with_bias: bool, ops: str) -> None:
    hidden, weight, bias, targets, grad = inputs(torch.float64)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    loss = CrossEntropy(VOCABULARY, label_smoothing=0.1, z_loss=1e-2)
    more = {"bias": bias} if with_bias else {}
    expected, *told = whole(hidden, weight, targets, loss, context(), **more)
    losses, *found = chunked_cross_entropy(hidden, weight, targets, loss, context(ops=ops), chunk_size, **more)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found, told, rtol=1e-12, atol=0.0)
    assert not any(each.requires_grad for each in found)
    assert (losses[6] == 0).all() and losses[2, 1] == 0, "ignored"
    wanted, found = (torch.autograd.grad(it, leaves, grad) for it in (expected, losses))
    for got, want in zip(found, wanted, strict=True):
        assert torch.linalg.vector_norm(got - want) <= 1e-12 * torch.linalg.vector_norm(want)


def test_a_sink_gets_the_part_of_every_chunk() -> None:
    hidden, weight, _, targets, grad = inputs(torch.float64)
    loss = CrossEntropy(VOCABULARY)
    (wanted,) = torch.autograd.grad(whole(hidden, weight, targets, loss, context()).objective, weight, grad)
    layout, total, numbers = context(), torch.zeros(COLUMNS, HIDDEN, dtype=torch.float64), []

    def sink(parameter: nn.Parameter, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        assert parameter is weight
        numbers.append(len(input))
        total.addmm_(grad_output.t(), input)

    layout.weight_gradients.sink = sink
    chunked_cross_entropy(hidden, weight, targets, loss, layout, 8).objective.backward(grad)
    assert numbers == [8, 8, 5]
    assert weight.grad is None
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-14)


class _Products(TorchDispatchMode):
    """The number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "of_a_chunk"), [("none", 3), ("hidden", 2), ("weight", 2)])
def test_nothing_is_computed_for_what_needs_no_gradient(frozen: str, of_a_chunk: int) -> None:
    hidden, weight, _, targets, grad = inputs(torch.float64)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    losses = chunked_cross_entropy(hidden, weight, targets, CrossEntropy(VOCABULARY), context(), 7).objective
    with _Products() as products:
        losses.backward(grad)
    assert products.number == 3 * of_a_chunk, "of each chunk the logits, and a gradient for each factor that wants one"
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_parts_of_a_16_bit_gradient_are_summed_in_32_bits() -> None:
    """Every token adds 1 to most gradients. In bfloat16 such a sum would stay at 256."""
    tokens, words = 300, 4
    hidden = torch.ones(tokens, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(torch.zeros(words, 8, dtype=torch.bfloat16))
    bias = nn.Parameter(torch.zeros(words, dtype=torch.bfloat16))
    targets, grad = torch.zeros(tokens, 1, dtype=torch.int64), torch.full((tokens, 1), float(words))
    layout = context(torch.bfloat16)
    losses = chunked_cross_entropy(hidden, weight, targets, CrossEntropy(words), layout, 1, bias).objective
    found = torch.autograd.grad(losses, [hidden, weight, bias], grad)
    assert losses.dtype == torch.float32 and {it.dtype for it in found} == {torch.bfloat16}
    wanted = tokens * torch.tensor([1.0 - words, 1.0, 1.0, 1.0])
    assert torch.equal(found[2].float(), wanted)
    assert torch.equal(found[1].float(), wanted.unsqueeze(1).expand(words, 8))


class _Largest(TorchDispatchMode):
    """The most elements that any tensor has that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("chunk_size", [4, None])
def test_only_the_logits_of_a_chunk_are_ever_there(chunk_size: int | None) -> None:
    hidden, weight, _, targets, grad = inputs(torch.float64)
    loss, layout, tokens = CrossEntropy(VOCABULARY), context(), SEQUENCE * BATCH
    with _Largest() as largest, SavedBytes([hidden, weight, targets]) as saved:
        if chunk_size is None:
            losses = whole(hidden, weight, targets, loss, layout).objective
        else:
            losses = chunked_cross_entropy(hidden, weight, targets, loss, layout, chunk_size).objective
        kept = saved.current
        losses.backward(grad)
    if chunk_size is None:
        assert largest.elements == tokens * COLUMNS
        assert kept == (tokens * COLUMNS + 2 * tokens) * 8
    else:
        assert largest.elements == COLUMNS * HIDDEN, "the gradient of the weight"
        assert kept == 2 * tokens * 8, "two numbers of each token"
        assert chunk_size * COLUMNS < tokens * HIDDEN < COLUMNS * HIDDEN


def test_two_runs_give_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        hidden, weight, _, targets, grad = inputs(torch.float32)
        losses = chunked_cross_entropy(
            hidden, weight, targets, CrossEntropy(VOCABULARY), context(torch.float32), 5
        ).objective
        runs.append((losses, *torch.autograd.grad(losses, [hidden, weight], grad)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    hidden, weight, _, targets, grad = inputs(torch.float32)
    layout, loss, leaves = context(torch.float32), CrossEntropy(VOCABULARY), [hidden, weight]

    def in_chunks(hidden: torch.Tensor, weight: nn.Parameter, targets: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(hidden, weight, targets, loss, layout, 8).objective

    compiled = torch.compile(in_chunks, fullgraph=True, backend="aot_eager")
    found, expected = (function(hidden, weight, targets) for function in (compiled, in_chunks))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(losses, leaves, grad) for losses in (found, expected)))
