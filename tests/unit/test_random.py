from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.random import keep_mask, normal_box, philox, random_words, stream_key, uniform_box

STEP = torch.tensor(3)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers that the authors of Philox publish with Random123.
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    result = philox(torch.tensor([int(word, 16) for word in key.split()]), (words[0], words[1], words[2], words[3]))
    assert [f"{int(word):08x}" for word in result] == expected.split()


def test_element_is_the_philox_word_at_its_place() -> None:
    """Pins the layout of the counter: column // 4, row low, row high, step."""
    key = stream_key(1, "name")
    row = (5 << 32) + 9
    words = random_words(key, 7, torch.tensor([row]), 0, 12)
    counter = (torch.tensor(2), torch.tensor(9), torch.tensor(5), torch.tensor(7))
    assert words[0, 8:].tolist() == [int(word) for word in philox(key, counter)]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A global shape of one to three dims and a box inside it."""
    global_shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
    offset = tuple(draw(st.integers(0, size - 1)) for size in global_shape)
    shape = tuple(draw(st.integers(1, size - start)) for size, start in zip(global_shape, offset, strict=True))
    return global_shape, offset, shape


def _cut(tensor: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


@pytest.mark.slow
@pytest.mark.parametrize("box", [normal_box, uniform_box])
@given(case=boxes())
@settings(deadline=None, max_examples=300)
def test_a_box_is_that_part_of_the_whole(
    box: Callable[..., torch.Tensor], case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
) -> None:
    global_shape, offset, shape = case
    whole = box(5, "weight", global_shape, (0,) * len(global_shape), global_shape)
    part = box(5, "weight", global_shape, offset, shape)
    assert part.shape == shape
    assert torch.equal(part, _cut(whole, offset, shape))


def test_boxes_of_a_large_matrix_are_that_part_of_it() -> None:
    """Large enough for vector instructions, for their remainders, and for more than one round of the loop over rows."""
    shape = (1300, 1027)
    whole = normal_box(5, "weight", shape, (0, 0), shape)
    for offset, size in (((0, 0), (650, 1027)), ((650, 0), (650, 1027)), ((0, 513), (1300, 514)), ((17, 3), (1001, 7))):
        assert torch.equal(normal_box(5, "weight", shape, offset, size), _cut(whole, offset, size))


@given(st.integers(0, 40), st.integers(0, 30), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_slice_of_words_is_that_part_of_the_whole(start: int, length: int, rows: list[int]) -> None:
    key = stream_key(0, "words")
    whole = random_words(key, 2, torch.tensor(rows), 0, 80)
    assert torch.equal(random_words(key, 2, torch.tensor(rows), start, length), whole[:, start : start + length])
    backwards = random_words(key, 2, torch.tensor(rows[::-1]), start, length)
    assert torch.equal(backwards.flip(0), whole[:, start : start + length])


def test_rows_may_have_any_shape() -> None:
    key, rows = stream_key(0, "words"), torch.arange(24).reshape(2, 3, 4)
    words = random_words(key, 0, rows, 1, 6)
    assert words.shape == (2, 3, 4, 6)
    assert torch.equal(words.reshape(24, 6), random_words(key, 0, rows.reshape(-1), 1, 6))


def test_step_is_a_number_or_a_tensor() -> None:
    key, rows = stream_key(0, "words"), torch.arange(8)
    assert torch.equal(random_words(key, 3, rows, 0, 8), random_words(key, STEP, rows, 0, 8))


def test_words_are_uniform() -> None:
    words = random_words(stream_key(11, "uniform"), 0, torch.arange(512), 0, 512)
    assert words.min() >= 0
    assert words.max() < 2**32
    fractions = words.double().flatten() / 2**32
    n = fractions.numel()
    # Five standard deviations of each estimate.
    assert abs(float(fractions.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    counts = torch.histc(fractions, bins=64, min=0.0, max=1.0)
    chi_square = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    for bit in range(32):
        assert abs(float(((words >> bit) & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n), f"bit {bit}"


def test_normals_have_the_moments_of_a_standard_normal() -> None:
    values = normal_box(11, "normal", (512, 512), (0, 0), (512, 512)).double()
    n = values.numel()
    assert values.dtype == torch.float64
    assert torch.isfinite(values).all()
    # E x^k of a standard normal, with the standard deviations of their estimates.
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((values**power).mean()) - expected) < 5 * math.sqrt(variance / n), f"moment {power}"
    inside = float((values.abs() < 1.0).double().mean())
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 5 * 0.5 / math.sqrt(n)
    assert float(values.abs().max()) > 4.0
    # Cosine and sine of one angle, neighbouring pairs, neighbouring rows.
    for a, b in ((values[:, 0::2], values[:, 1::2]), (values[:, 1:-1:2], values[:, 2::2]), (values[1:], values[:-1])):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def test_uniform_numbers_have_their_moments() -> None:
    values = uniform_box(11, "uniform", (512, 512), (0, 0), (512, 512)).double()
    # E x^k over [-1, 1], with the variances of their estimates from one value.
    for power, expected, variance in ((1, 0.0, 1 / 3), (2, 1 / 3, 1 / 5 - 1 / 9), (3, 0.0, 1 / 7)):
        estimate = float((values**power).mean())
        assert abs(estimate - expected) < 5 * math.sqrt(variance / values.numel()), f"moment {power}"
    assert float(values.abs().max()) <= 1.0
    for a, b in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1])):
        assert abs(float((a * b).mean())) < 5 / 3 / math.sqrt(a.numel())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, "a", 0), (2, "a", 0)),
        ((1, "a", 0), (1, "b", 0)),
        ((1, "a", 0), (1, "a", 1)),
        ((1, "1/a", 0), (11, "/a", 0)),
        ((1, "decoder.layers.1", 0), (1, "decoder.layers.11", 0)),
    ],
)
def test_streams_are_independent(first: tuple[int, str, int], second: tuple[int, str, int]) -> None:
    def words(seed: int, name: str, step: int) -> torch.Tensor:
        return random_words(stream_key(seed, name), step, torch.arange(128), 0, 128).double() / 2**32 - 0.5

    a, b = words(*first), words(*second)
    # Two of 16,384 words of 32 bits agree at one place with a chance of 4 in a million.
    assert int((a == b).sum()) == 0
    correlation = float((a * b).mean()) * 12
    assert abs(correlation) < 5 / 128


def test_rows_that_differ_above_32_bits_differ() -> None:
    key = stream_key(1, "rows")
    low, high = random_words(key, 0, torch.tensor([6, 6 + 2**32]), 0, 64)
    assert int((low == high).sum()) == 0


def test_the_same_question_gets_the_same_answer() -> None:
    assert torch.equal(stream_key(3, "x"), stream_key(3, "x"))
    assert torch.equal(normal_box(3, "x", (8, 8), (0, 0), (8, 8)), normal_box(3, "x", (8, 8), (0, 0), (8, 8)))


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_the_fraction_that_is_kept(drop: float) -> None:
    kept = keep_mask(stream_key(2, "keep"), STEP, torch.arange(400), 0, 500, drop)
    assert kept.dtype == torch.bool
    deviation = math.sqrt(drop * (1 - drop) / kept.numel())
    assert abs(float(kept.double().mean()) - (1 - drop)) <= 5 * deviation


def test_masks_of_a_slice_and_of_other_steps() -> None:
    key, rows = stream_key(2, "keep"), torch.arange(64)
    whole = keep_mask(key, STEP, rows, 0, 64, 0.5)
    assert torch.equal(keep_mask(key, STEP, rows[10:30], 5, 21, 0.5), whole[10:30, 5:26])
    other = keep_mask(key, STEP + 1, rows, 0, 64, 0.5)
    assert 0.4 < float((whole == other).double().mean()) < 0.6
