from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megallm.data_parallel.buckets import build_buckets
from megallm.mesh import Mesh, MeshShape
from megallm.parameter import (
    Description,
    Initial,
    Piece,
    boxes_of_range,
    description_of,
    freeze,
    initialize,
    make_parameter,
    padded_part,
    part,
    piece_views,
    whole,
    xavier_uniform,
)

CPU = torch.device("cpu")


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    begin = draw(st.integers(0, math.prod(shape)))
    return shape, begin, draw(st.integers(begin, math.prod(shape)))


@given(flat_ranges())
def test_boxes_cover_a_flat_range_exactly_and_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, begin, end = case
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    boxes = boxes_of_range(shape, begin, end)
    found = []
    for offset, size in boxes:
        box = numbers[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]
        assert box.shape == size, "a box leaves the tensor"
        found += box.flatten().tolist()
    assert found == list(range(begin, end))
    assert len(boxes) <= 2 * len(shape) - 1


@given(st.lists(st.integers(3, 6), min_size=1, max_size=4).map(tuple))
def test_the_bound_on_the_number_of_boxes_is_reached(shape: tuple[int, ...]) -> None:
    """From the second element to the last but one: a box on either side for each dim, and one between."""
    assert len(boxes_of_range(shape, 1, math.prod(shape) - 1)) == 2 * len(shape) - 1


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 4)])
def test_the_whole_range_is_one_box(shape: tuple[int, ...]) -> None:
    assert boxes_of_range(shape, 0, math.prod(shape)) == [((0,) * len(shape), shape)]
    assert boxes_of_range(shape, 2, 2) == []


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3))
def test_padded_parts_cover_the_logical_rows_once(rows: int, parts: int, extra: int) -> None:
    padded = -(-rows // parts) * parts + extra * parts
    pieces = [padded_part("w", (rows, 7), padded, parts, index) for index in range(parts)]
    covered: list[int] = []
    for piece in pieces:
        assert piece.rows == padded // parts, "every rank stores the same number of rows"
        assert piece.shape[1:] == (7,)
        assert piece.offset[1:] == (0,)
        covered += range(piece.offset[0], piece.offset[0] + piece.shape[0])
    assert covered == list(range(rows))


def test_a_rank_may_hold_padding_only() -> None:
    piece = padded_part("w", (5, 3), 16, 4, 2)
    assert (piece.offset, piece.shape, piece.padding) == ((5, 0), (0, 3), 4)


def test_part_cuts_any_dim_evenly() -> None:
    assert part("w", (6, 8), 1, 4, 3) == Piece("w", (6, 8), (0, 6), (6, 2))
    assert part("w", (6, 8), 0, 2, 1) == Piece("w", (6, 8), (3, 0), (3, 8))
    with pytest.raises(AssertionError, match="does not split"):
        part("w", (6, 8), 0, 4, 0)


def _padded_description() -> Description:
    """Rows 0-2 are `a`, row 3 is padding, rows 4-5 are `b`."""
    return Description(
        (Piece("a", (9, 4), (3, 0), (3, 4), padding=1), Piece("b", (2, 4), (0, 0), (2, 4))), Initial("normal", 0.5)
    )


def test_views_are_the_rows_of_each_piece_without_padding() -> None:
    description = _padded_description()
    parameter = make_parameter(description, torch.float64, CPU)
    assert parameter.shape == (6, 4)
    assert description_of(parameter) is description
    with torch.no_grad():
        parameter.fill_(-1.0)
        for number, (piece, view) in enumerate(piece_views(parameter, description)):
            assert view.shape == piece.shape
            view.fill_(number)
    assert parameter[:, 0].tolist() == [0.0, 0.0, 0.0, -1.0, 1.0, 1.0]


def test_initial_values_are_those_of_the_whole_tensor_and_padding_is_zero() -> None:
    one = make_parameter(Description((whole("a", (9, 4)),), Initial("normal", 0.5)), torch.float64, CPU)
    cut = make_parameter(_padded_description(), torch.float64, CPU)
    initialize(one, seed=3)
    initialize(cut, seed=3)
    assert torch.equal(cut[:3], one[3:6])
    assert torch.equal(cut[3], torch.zeros(4))
    assert cut[4:].abs().min() > 0.0
    assert not torch.equal(cut[4:], one[:2]), "another name, other values"
    initialize(cut, seed=4)
    assert not torch.equal(cut[:3], one[3:6]), "another seed, other values"


def test_standard_deviation_scales_the_initial_values() -> None:
    parameter = make_parameter(Description((whole("a", (200, 200)),), Initial("normal", 0.02)), torch.float32, CPU)
    initialize(parameter, seed=0)
    # The estimate of a standard deviation from n values has a relative one of 1 / sqrt(2 n).
    assert float(parameter.detach().std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * 40_000))


def test_uniform_values_fill_their_range() -> None:
    initial = xavier_uniform((250, 350))
    parameter = make_parameter(Description((whole("a", (100, 350)),), initial), torch.float32, CPU)
    initialize(parameter, seed=0)
    bound = math.sqrt(6 / 600)
    assert initial == Initial("uniform", bound)
    assert bound * (1 - 1e-3) < float(parameter.detach().abs().max()) <= bound
    # A standard deviation has one of bound / sqrt(3) x sqrt((9 / 5 - 1) / 4 n), relative to itself, when estimated.
    assert float(parameter.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=5 * math.sqrt(0.2 / 35_000))


def test_constants() -> None:
    parameter = make_parameter(Description((whole("a", (7,)),), Initial("constant", 1.0)), torch.float32, CPU)
    initialize(parameter, seed=0)
    assert parameter.tolist() == [1.0] * 7


def test_a_frozen_parameter_says_so_and_gets_no_gradient_buffer() -> None:
    module = torch.nn.Module()
    module.first = make_parameter(Description((whole("first", (3, 2)),)), torch.float32, CPU)
    module.second = make_parameter(Description((whole("second", (5,)),), decays=False), torch.float32, CPU)
    freeze(module.first)
    assert not module.first.requires_grad
    assert not description_of(module.first).trains
    assert description_of(module.first).pieces[0].name == "first"
    assert module.second.requires_grad
    assert description_of(module.second).trains
    buckets = build_buckets({0: module}, Mesh(MeshShape(), 0, CPU), max_elements=100, sharded=False)
    assert [member.parameter for bucket in buckets for member in bucket.members] == [module.second]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_parameters_and_gradients_begin_at_16_bytes(dtype: torch.dtype) -> None:
    module = torch.nn.Module()
    for number, size in enumerate((3, 64, 65, 1)):
        description = Description((whole(f"{number}", (size,)),), Initial("constant", 1.0))
        setattr(module, f"p{number}", make_parameter(description, dtype, CPU))
        initialize(getattr(module, f"p{number}"), seed=0)
    (bucket,) = build_buckets({0: module}, Mesh(MeshShape(), 0, CPU), max_elements=1000, sharded=True)
    for member in bucket.members:
        assert member.parameter.data_ptr() % 16 == bucket.gradient_of(member).data_ptr() % 16 == 0
        assert (member.parameter == 1.0).all()
    assert bucket.weights.count_nonzero() == 3 + 64 + 65 + 1, "the rest is zero"
    assert bucket.num_paddings == len(bucket.weights) - (3 + 64 + 65 + 1)


def test_a_description_that_does_not_train_makes_a_frozen_parameter() -> None:
    assert not make_parameter(Description((whole("a", (3,)),), trains=False), torch.float32, CPU).requires_grad
