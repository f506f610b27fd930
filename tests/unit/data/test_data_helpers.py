"""Sample starts and blends: golden vectors, a slow walk, and the compiled functions against those in numpy."""

import math

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


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(0, 2**31 - 1)), min_size=1, max_size=50).filter(any),
    data=st.data(),
    wide=st.booleans(),
)
def test_native_sample_index_equals_numpy_on_long_documents(lengths, data, wide):
    sequence_length = data.draw(st.integers(max(1, sum(lengths) // 1000), 2**33))
    num_samples = (sum(lengths) - 1) // sequence_length
    documents = np.array(data.draw(st.permutations(range(len(lengths)))), np.int32)
    arguments = (np.array(lengths, np.int32), documents, sequence_length, num_samples, wide)
    np.testing.assert_array_equal(
        _native("build_sample_index")(*arguments), reference.build_sample_index(*arguments), strict=True
    )


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


def blend(weights, size, sizes=None):
    """The rule of a blend in plain Python: at each step look at every dataset."""
    drawn, datasets, samples = [0] * len(weights), [], []
    for step in range(size):
        best, chosen = -math.inf, 0
        for dataset, weight in enumerate(weights):
            lag = weight * max(step, 1) - drawn[dataset]
            if lag > best and (sizes is None or drawn[dataset] < sizes[dataset]):
                best, chosen = lag, dataset
        datasets.append(chosen)
        samples.append(drawn[chosen])
        drawn[chosen] += 1
    return datasets, samples


def assert_blends_equal(found, expected):
    assert [part.tolist() for part in found] == list(expected)


def ulps_apart(weight):
    """Weights so close that rounding decides between them."""
    return st.integers(-3, 3).map(lambda ulps: weight + ulps * math.ulp(weight))


WEIGHTS = st.one_of(
    # Small whole numbers tie often, also after they are normalised.
    st.lists(st.integers(0, 6).map(float), min_size=1, max_size=40).filter(any),
    st.lists(st.floats(1e-6, 1), min_size=1, max_size=40),
    st.lists(st.one_of(ulps_apart(0.1), ulps_apart(0.3), st.just(0.25)), min_size=1, max_size=40),
    st.lists(st.floats(1, 1.001), min_size=1, max_size=40),
)


@BOTH
@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS, size=st.integers(0, 300), normalised=st.booleans())
def test_blend_is_the_loop_over_all_datasets(functions, weights, size, normalised):
    if normalised:
        weights = (np.array(weights) / np.sum(weights)).tolist()
    assert_blends_equal(functions.build_blending_indices(np.array(weights), size), blend(weights, size))


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS, scale=st.sampled_from([1e-9, 1e9, 2.0**40, 1e12, 1e15]), size=st.integers(0, 300))
def test_blend_is_exact_where_lags_are_badly_rounded(weights, scale, size):
    """Weights of a large sum bring the rounding of a draw number 1e15 into the first few draws."""
    scaled = [weight * scale for weight in weights]
    assert_blends_equal(_native("build_blending_indices")(np.array(scaled), size), blend(scaled, size))


@BOTH
@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=25))
def test_exhaustive_blend_is_the_loop_over_all_datasets(functions, sizes):
    total = sum(sizes)
    expected = blend([size / max(total, 1) for size in sizes], total, sizes)
    assert_blends_equal(functions.build_exhaustive_blending_indices(np.array(sizes)), expected)


@pytest.mark.parametrize("spread", [0.0, 1e-15, 1e-12, 1e-6, 1.0, "lognormal"])
def test_native_blend_of_many_datasets_equals_numpy(spread):
    generator = np.random.default_rng(0)
    weights = generator.lognormal(0, 2, 3000) if spread == "lognormal" else 1 + spread * generator.random(3000)
    weights /= weights.sum()
    for found, expected in zip(
        _native("build_blending_indices")(weights, 10_000),
        reference.build_blending_indices(weights, 10_000),
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
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and not negative"):
            functions.build_blending_indices(np.array([0.5, wrong]), 3)
    with pytest.raises(ValueError, match="must not be negative"):
        functions.build_exhaustive_blending_indices(np.array([1, -1]))


@BOTH
@settings(max_examples=150, deadline=None)
@given(
    size=st.one_of(st.integers(0, 20), st.integers(0, 3000), st.sampled_from([255, 256, 257, 1023, 1024, 1025, 2049])),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["int32", "uint32", "int64", "float32", "float64", "int16", "uint8"]),
    drawn_before=st.integers(0, 1300),
)
def test_shuffle_is_numpys(functions, size, seed, dtype, drawn_before):
    ours, numpys = np.random.RandomState(seed), np.random.RandomState(seed)
    for generator in (ours, numpys):
        generator.random_sample(drawn_before)
        generator.standard_normal()  # leaves a second one for later, which is part of the state
    # A slice of a longer array: its neighbours must stay.
    found, expected = (np.arange(size + 2).astype(dtype) for _ in range(2))
    functions.shuffle(ours, found[1:-1])
    numpys.shuffle(expected[1:-1])
    np.testing.assert_array_equal(found, expected, strict=True)
    assert ours.standard_normal() == numpys.standard_normal()
    assert ours.randint(0, 2**40, 5).tolist() == numpys.randint(0, 2**40, 5).tolist()


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_long_shuffle_is_numpys(dtype):
    _native("shuffle")
    found, expected = (np.arange(3_000_000, dtype=dtype) for _ in range(2))
    helpers.shuffle(np.random.RandomState(7), found)
    np.random.RandomState(7).shuffle(expected)
    np.testing.assert_array_equal(found, expected)


def test_shuffle_leaves_other_generators_to_numpy():
    found, expected = np.arange(1000), np.arange(1000)
    helpers.shuffle(np.random.RandomState(np.random.PCG64(3)), found)
    np.random.RandomState(np.random.PCG64(3)).shuffle(expected)
    np.testing.assert_array_equal(found, expected)


def test_native_shuffle_refuses_what_it_cannot_do():
    shuffle = _native("shuffle")
    key = np.zeros(624, np.uint32)
    for array, words, position, message in (
        (np.zeros((2, 2), np.int32), key, 0, "contiguous"),
        (np.zeros(4, np.int32)[::2], key, 0, "contiguous"),
        (np.zeros(4, np.int16), key, 0, "4 or 8 bytes"),
        (np.zeros(4, np.int32), key[:3], 0, "no state"),
        (np.zeros(4, np.int32), key, 625, "no state"),
    ):
        with pytest.raises(ValueError, match=message):
            shuffle(array, words, position)
