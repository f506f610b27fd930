"""Sample starts and blends: golden vectors, a slow walk, and the compiled functions against those in numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.data.samples import helpers, reference


def _native(name):
    if not helpers.is_native():
        pytest.skip("megallm.data.samples._helpers is not built (pip install -e .): there is nothing to compare")
    return getattr(helpers._native, name)


# Each test of the functions runs on those that are used and on those in numpy.
BOTH = pytest.mark.parametrize("functions", [helpers, reference], ids=["used", "numpy"])


def walk(lengths, documents, sequence_length, num_samples):
    """Starts of the samples, token by token."""
    stream = [(position, offset) for position, number in enumerate(documents) for offset in range(lengths[number])]
    return [(0, 0), *(stream[sample * sequence_length] for sample in range(1, num_samples + 1))]


@st.composite
def documents_and_samples(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
    documents = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=20))
    total = sum(lengths[number] for number in documents)
    sequence_length = draw(st.integers(1, 12))
    return lengths, documents, sequence_length, draw(st.integers(0, max(0, total - 1) // sequence_length))


@BOTH
@settings(max_examples=150, deadline=None)
@given(case=documents_and_samples(), wide=st.booleans())
def test_sample_index_is_the_slow_walk(functions, case, wide):
    lengths, documents, sequence_length, num_samples = case
    found = functions.build_sample_index(
        np.array(lengths, np.int32), np.array(documents, np.int32), sequence_length, num_samples, wide
    )
    assert found.dtype == (np.int64 if wide else np.int32)
    assert [tuple(row) for row in found.tolist()] == walk(lengths, documents, sequence_length, num_samples)


def test_native_sample_index_equals_numpy_on_many_documents():
    native = _native("build_sample_index")
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 3000, 20000).astype(np.int32)
    documents = generator.permutation(np.tile(np.arange(20000, dtype=np.int32), 3))
    num_samples = (3 * int(lengths.sum()) - 1) // 1024
    arguments = (lengths, documents, 1024, num_samples, False)
    np.testing.assert_array_equal(native(*arguments), reference.build_sample_index(*arguments), strict=True)


@BOTH
def test_sample_index_counts_beyond_32_bits(functions):
    longest = 2**31 - 1
    lengths, documents = np.array([longest], np.int32), np.zeros(8, np.int32)
    found = functions.build_sample_index(lengths, documents, 2**30, 15, False)
    starts = [divmod(sample * 2**30, longest) for sample in range(16)]
    assert [tuple(row) for row in found.tolist()] == starts


@BOTH
def test_sample_index_refuses_what_is_not_there(functions):
    lengths = np.array([3, 2], np.int32)
    with pytest.raises(ValueError, match="hold 5 tokens, too few for 2 samples of 3"):
        functions.build_sample_index(lengths, np.array([0, 1], np.int32), 3, 2, False)
    with pytest.raises(ValueError, match="not among 2 sequences"):
        functions.build_sample_index(lengths, np.array([0, 2], np.int32), 2, 2, False)
    with pytest.raises(ValueError, match="sequence_length must be positive"):
        functions.build_sample_index(lengths, np.array([0], np.int32), 0, 1, False)


@BOTH
def test_golden_blends(functions):
    datasets, samples = functions.build_blending_indices(np.array([0.3, 0.7]), 10)
    assert datasets.tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    assert samples.tolist() == [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]
    assert (datasets.dtype, samples.dtype) == (np.int16, np.int64)
    datasets, _ = functions.build_blending_indices(np.array([0.5, 0.3, 0.2]), 12)
    assert datasets.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1]
    datasets, samples = functions.build_exhaustive_blending_indices(np.array([3, 5, 2]))
    assert datasets.tolist() == [1, 0, 2, 1, 0, 1, 2, 1, 0, 1]
    assert samples.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 200))
def test_native_blends_equal_numpy(counts, size):
    weights = np.array(counts, np.float64) / sum(counts)
    for found, expected in zip(
        _native("build_blending_indices")(weights, size), reference.build_blending_indices(weights, size), strict=True
    ):
        np.testing.assert_array_equal(found, expected, strict=True)
    sizes = np.array(counts, np.int64)
    for found, expected in zip(
        _native("build_exhaustive_blending_indices")(sizes),
        reference.build_exhaustive_blending_indices(sizes),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected, strict=True)


@BOTH
def test_exhaustive_blend_draws_everything_once(functions):
    sizes = np.array([7, 0, 3, 11])
    datasets, samples = functions.build_exhaustive_blending_indices(sizes)
    for dataset, size in enumerate(sizes):
        assert samples[datasets == dataset].tolist() == list(range(size))


@BOTH
@pytest.mark.parametrize(("count", "dtype"), [(32767, np.int16), (32768, np.int32)])
def test_any_number_of_datasets(functions, count, dtype):
    datasets, _ = functions.build_blending_indices(np.full(count, 1 / count), 3)
    assert datasets.dtype == dtype
    assert datasets.tolist() == [0, 1, 2]


@BOTH
def test_blends_refuse_nonsense(functions):
    with pytest.raises(ValueError, match="one dataset at least"):
        functions.build_blending_indices(np.empty(0), 3)
    with pytest.raises(ValueError, match="not negative"):
        functions.build_blending_indices(np.ones(1), -1)
    with pytest.raises(ValueError, match="must not be negative"):
        functions.build_exhaustive_blending_indices(np.array([1, -1]))
