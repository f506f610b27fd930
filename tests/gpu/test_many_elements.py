"""Tensors of more elements than 32 bits count: every row has the bits of the same row in a small tensor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megallm.ops.embedding import accumulate_rows
from megallm.ops.initial import normal_box
from megallm.ops.library import NATIVE
from megallm.ops.sum_of_squares import sum_of_squares
from tests.unit.ops.accuracy import Case
from tests.unit.ops.cases import CASES

WIDTH = 4096
MANY = 2**31
# AdamW's: four tensors of float32, twice, a copy of the gradient, and room.
NEEDED_BYTES = 11 * 4 * MANY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not NATIVE.cuda_architectures, reason="built without CUDA operators"),
]
# The other two operators keep nothing of a row by itself.
OF_ROWS = [case for case in CASES if case.operator not in ("embedding_gradient", "sum_of_squares")]


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES / 2**30:.0f} GiB of memory")
    yield
    torch.cuda.empty_cache()


def repeated(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows: those of `tensor`, again and again."""
    return tensor[torch.arange(count, device=tensor.device) % len(tensor)]


@pytest.mark.parametrize("case", OF_ROWS, ids=str)
def test_the_last_rows_are_those_of_a_small_tensor(case: Case) -> None:
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
    small = case.inputs((5, WIDTH), dtype, "cuda")
    grads = case.output_gradients(small)
    expected = case.results(small, grads, "native")
    widest = max(tensor[0].numel() for name, tensor in small.items() if name not in case.shared)
    count = MANY // widest + 4
    large = {name: tensor if name in case.shared else repeated(tensor, count) for name, tensor in small.items()}
    all_grads = [repeated(grad, count) for grad in grads] if case.differentiable(small) else []
    found = case.results(large, all_grads, "native")
    last = torch.arange(count - 7, count, device="cuda") % 5
    for name, result in found.items():
        if name.removeprefix("grad_") not in case.shared:
            assert torch.equal(result[-7:], expected[name][last]), f"{case.name}: {name}"


def test_sum_of_squares() -> None:
    values = torch.ones(MANY + 5, device="cuda")
    values[-1] = 3.0
    assert sum_of_squares([values], values.device, "native").item() == MANY + 4 + 9


def test_embedding_gradient() -> None:
    count = MANY // WIDTH + 4
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(-8, 9, (7, WIDTH), generator=generator).cuda()
    rows = torch.arange(count, device="cuda") % 7
    table = torch.zeros(7, WIDTH, device="cuda")
    accumulate_rows(table, repeated(small.to(torch.bfloat16), count), rows, "native")
    # Whole numbers, whose sums have no rounding.
    assert torch.equal(table, small * rows.bincount(minlength=7).unsqueeze(-1).float())


def test_embedding_gradient_of_a_large_table() -> None:
    entries = MANY // WIDTH + 4
    table = torch.zeros(entries, WIDTH, device="cuda")
    accumulate_rows(table, torch.ones(2, WIDTH, device="cuda"), torch.tensor([entries - 1] * 2).cuda(), "native")
    assert (table[-1] == 2).all() and not table[:-1].any()


def test_initial_values() -> None:
    shape = (MANY // WIDTH + 4, WIDTH)
    large = normal_box(7, "weight", shape, (0, 0), shape, torch.device("cuda"), "native")
    last = normal_box(7, "weight", shape, (shape[0] - 5, 0), (5, WIDTH), torch.device("cuda"), "native")
    assert torch.equal(large[-5:], last)
