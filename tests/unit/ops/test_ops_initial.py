"""Native initial values against those of megallm.random."""

import pytest
import torch

from megallm import random
from megallm.config.operators import OPERATORS
from megallm.ops.initial import normal_box, uniform_box
from megallm.ops.library import NATIVE
from megallm.parameter import Description, Initial, initialize, make_parameter, whole

pytestmark = pytest.mark.skipif("initial_values" not in NATIVE.on_cpu, reason="not built")

BOXES = [
    ((40, 300), (0, 0), (40, 300)),
    ((40, 300), (7, 3), (20, 290)),
    ((40, 300), (39, 299), (1, 1)),
    ((3, 1500, 1030), (1, 600, 1), (1, 2, 1029)),
    ((70_000_000_000, 5), (69_999_999_000, 2), (11, 3)),
    ((2000,), (5,), (1025,)),
    ((4, 4), (0, 2), (0, 2)),
]


@pytest.mark.parametrize(("global_shape", "offset", "shape"), BOXES)
def test_uniform_values_have_the_bits_of_the_reference(global_shape, offset, shape):
    found = uniform_box(7, "weight", global_shape, offset, shape, implementation="native")
    assert torch.equal(found, random.uniform_box(7, "weight", global_shape, offset, shape))


@pytest.mark.parametrize(("global_shape", "offset", "shape"), BOXES)
def test_normal_values_are_those_of_the_reference(global_shape, offset, shape):
    found = normal_box(7, "weight", global_shape, offset, shape, implementation="native")
    expected = normal_box(7, "weight", global_shape, offset, shape, implementation="reference")
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2.0**-23, atol=0)


def test_of_a_million_normal_values_hardly_one_has_another_bit():
    shape = (1000, 1000)
    found, expected = (
        normal_box(3, "x", shape, (0, 0), shape, implementation=choice) for choice in ("native", "reference")
    )
    assert (found != expected).sum() <= 5


def test_a_box_is_the_part_of_the_whole():
    whole_tensor = normal_box(5, "w", (31, 2100), (0, 0), (31, 2100), implementation="native")
    part = normal_box(5, "w", (31, 2100), (4, 1021), (9, 1033), implementation="native")
    assert torch.equal(part, whole_tensor[4:13, 1021:2054])


def test_number_of_threads_changes_nothing():
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(normal_box(5, "w", (300, 1024), (0, 0), (300, 1024), implementation="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_a_device_does_not_make_is_made_on_the_cpu_and_moved():
    for box in (normal_box, uniform_box):
        moved = box(5, "w", (4, 8), (1, 2), (2, 3), torch.device("meta"))
        assert moved.is_meta
        assert moved.shape == (2, 3)
        with pytest.raises(RuntimeError, match="native initial_values"):
            box(5, "w", (4, 8), (1, 2), (2, 3), torch.device("meta"), "native")


def test_parameters_start_with_the_chosen_implementation(monkeypatch):
    description = Description((whole("w", (6, 7)),), initial=Initial("normal", 2.0))
    parameter = make_parameter(description, torch.float32, torch.device("cpu"))
    initialize(parameter, 9, "native")
    first = parameter.detach().clone()
    initialize(parameter, 9, "reference")
    torch.testing.assert_close(first, parameter.detach(), rtol=2.0**-22, atol=0)


def test_no_rows_and_no_columns():
    key = random.stream_key(1, "x")
    for rows, columns in ((0, 5), (3, 0), (0, 0)):
        for start in (0, 3):
            made = torch.ops.megallm.initial_rows(key, torch.arange(rows), start, columns, True)
            assert made.shape == (rows, columns)


def test_opcheck():
    arguments = (random.stream_key(1, "x"), torch.arange(3), 5, 7, True)
    torch.library.opcheck(torch.ops.megallm.initial_rows.default, arguments)
    assert OPERATORS["initial_values"] == ("initial_rows",)


@pytest.mark.slow
def test_compiles_as_one_graph():
    def made(key, rows):
        return torch.ops.megallm.initial_rows(key, rows, 5, 7, True) * 2

    key, rows = random.stream_key(1, "x"), torch.arange(3)
    assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(key, rows), made(key, rows))
