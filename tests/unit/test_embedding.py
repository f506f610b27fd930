"""The word embedding's gradient is summed in float32, however often a token occurs."""

from __future__ import annotations

import pytest
import torch

from megallm.communication import Group, Transport
from megallm.layers.context import LayoutContext
from megallm.layers.embedding import embed_tokens, vocabulary_parameter
from megallm.ops.embedding import accumulate_rows, add_rows
from megallm.ops.library import NATIVE
from megallm.parameter import normal


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_frequent_token_keeps_its_gradient_in_bfloat16(implementation: str):
    alone = Group((0,), 0, Transport(None))
    context = LayoutContext(alone, False, torch.bfloat16, torch.device("cpu"), seed=1)
    weight = vocabulary_parameter("w", 5, 5, 8, context, normal(0.02))
    torch.nn.init.zeros_(weight)
    kept = torch.zeros(5, 8)

    def keep(parameter: torch.nn.Parameter, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        accumulate_rows(kept, gradient, rows, implementation)

    context.weight_gradients.row_sink = keep
    embed_tokens(torch.full((4, 1024), 3), weight, context).backward(torch.ones(1024, 4, 8, dtype=torch.bfloat16))
    # Ones summed in bfloat16 stop at 256.
    assert torch.equal(kept[3], torch.full((8,), 4096.0))
    assert kept.sum() == 4096 * 8
    assert weight.grad is None


def test_without_a_sink_autograd_gets_the_gradient():
    context = LayoutContext(Group((0,), 0, Transport(None)), False, torch.float64, torch.device("cpu"), seed=1)
    weight = vocabulary_parameter("w", 5, 5, 3, context, normal(0.02))
    torch.nn.init.normal_(weight)
    tokens = torch.tensor([[0, 1, 1, 4]])
    grad = torch.randn(4, 1, 3, dtype=torch.float64)
    embed_tokens(tokens, weight, context).backward(grad)
    expected = torch.autograd.grad(torch.nn.functional.embedding(tokens.t(), weight), weight, grad)[0]
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.skipif(not NATIVE.loaded, reason=f"native operators: {NATIVE.reason}")
def test_a_row_that_the_table_lacks_is_told_in_words():
    x, table, rows = torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 5, 4])
    with pytest.raises(RuntimeError, match="add_rows: the table has no row 5"):
        add_rows(x, table, rows, "native")
    with pytest.raises(RuntimeError, match="add_rows: the table has no row -1"):
        add_rows(x, table, torch.tensor([0, -1, 4]), "native")
    with pytest.raises(RuntimeError, match="embedding_gradient: the table has no row 5"):
        accumulate_rows(table, x, rows, "native")
    assert (table == 1).all()
