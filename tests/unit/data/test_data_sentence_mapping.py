"""Which sentences make a sample: vectors of Megatron's own function, a slow walk, compiled against numpy."""

from itertools import accumulate, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_masking import flat, mersenne, sentence_rows

from megallm.data.samples import sentence_mapping, sentence_mapping_reference

DOCUMENTS = [[4, 9, 3], [7], [2, 2, 2, 2, 2], [600], [5, 513], [12, 30, 4, 8, 8, 1], []]
# What build_mapping of megatron-core 0.12.1, as published on PyPI, gave for DOCUMENTS. Arguments: samples, tokens,
# probability of short ones, seed, sentences.
GOLDEN = [
    ((1, 12, 0.0, 1234, 2), [[4, 9, 12], [0, 3, 12], [12, 14, 12], [16, 18, 12], [14, 16, 12]]),
    (
        (1, 12, 0.1, 1234, 1),
        [[12, 13, 12], [3, 4, 12], [13, 14, 12], [16, 18, 12], [0, 3, 12], [4, 9, 12], [14, 16, 12], [9, 10, 12]],
    ),
    (
        (20, 20, 0.4, 7, 2),
        [
            *([14, 18, 20], [4, 9, 20], [0, 3, 20], [12, 14, 20], [12, 14, 15], [14, 16, 7], [0, 3, 15], [0, 3, 5]),
            *([16, 18, 20], [4, 9, 20], [14, 16, 5], [16, 18, 20], [14, 16, 7], [0, 3, 6], [16, 18, 20], [4, 9, 18]),
            *([4, 9, 20], [14, 16, 11], [16, 18, 20], [0, 3, 20], [12, 14, 11], [12, 14, 20], [12, 14, 20], [4, 9, 20]),
        ],
    ),
]


def arrays(documents):
    bounds = np.array([0, *accumulate(len(lengths) for lengths in documents)], np.int64)
    return bounds, np.array(flat(documents), np.int32)


@pytest.fixture(params=["native", "reference"])
def build(request, monkeypatch):
    """The public function on the compiled one, and on the one in numpy."""
    if request.param == "reference":
        monkeypatch.setattr(sentence_mapping, "_native", None)
    elif not sentence_mapping.is_native():
        pytest.skip("megallm.data.samples._helpers is not built (pip install -e .): there is nothing to test")
    return sentence_mapping.build_sentence_mapping


def test_generators_are_the_standard_s():
    # The 10,000th numbers of both generators, which the C++ standard gives in [rand.predef].
    assert next(islice(mersenne(5489, 32), 9999, None)) == 4123659995
    assert next(islice(mersenne(5489, 64), 9999, None)) == 9981545732273789042
    assert next(islice(sentence_mapping_reference.mersenne_32(5489), 9999, None)) == 4123659995
    assert int(sentence_mapping_reference.mersenne_64(5489, 10000)[-1]) == 9981545732273789042


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**31, 2**32 - 1])
def test_generators_in_numpy_are_the_slow_ones(seed):
    assert list(islice(sentence_mapping_reference.mersenne_32(seed), 1500)) == list(islice(mersenne(seed, 32), 1500))
    for count in (0, 1, 311, 312, 313, 1000):
        assert sentence_mapping_reference.mersenne_64(seed + 1, count).tolist() == list(
            islice(mersenne(seed + 1, 64), count)
        )


@pytest.mark.parametrize(("arguments", "rows"), GOLDEN)
def test_golden_rows(build, arguments, rows):
    found = build(*arrays(DOCUMENTS), *arguments)
    assert found.dtype == np.uint32
    assert found.tolist() == rows


SENTENCES = st.lists(
    st.lists(st.one_of(st.integers(0, 40), st.sampled_from([512, 513])), max_size=9), min_size=1, max_size=8
)


@settings(max_examples=150, deadline=None)
@given(
    documents=SENTENCES,
    num_samples=st.one_of(st.none(), st.integers(1, 40)),
    max_length=st.integers(2, 90),
    probability=st.one_of(st.sampled_from([0.0, 1.0, 0.4, 0.1, 1e-9, 1e-300]), st.floats(0.01, 1)),
    seed=st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 9)),
    min_sentences=st.integers(1, 2),
)
@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_rows_are_the_slow_walk_s(native, documents, num_samples, max_length, probability, seed, min_sentences):
    expected = sentence_rows(documents, num_samples, max_length, probability, seed, min_sentences)
    module = sentence_mapping._native if native else sentence_mapping_reference
    if module is None:
        pytest.skip("megallm.data.samples._helpers is not built (pip install -e .): there is nothing to test")
    for wide, dtype in ((False, np.uint32), (True, np.int64)):
        found = module.build_sentence_mapping(
            *arrays(documents),
            num_samples or 1,
            max_length,
            sentence_mapping.short_ratio(probability),
            seed,
            min_sentences,
            wide,
        )
        assert found.dtype == dtype
        assert found.shape == (len(expected), 3)
        assert found.tolist() == expected


def test_native_equals_reference_on_many_documents():
    if not sentence_mapping.is_native():
        pytest.skip("megallm.data.samples._helpers is not built (pip install -e .): there is nothing to test")
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 20, 5000)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    lengths = generator.integers(1, 60, bounds[-1]).astype(np.int32)
    # A split that starts in the middle of the dataset.
    arguments = (bounds[1000:], lengths, 20000, 125, 10, 3, 2, False)
    found = sentence_mapping._native.build_sentence_mapping(*arguments)
    np.testing.assert_array_equal(found, sentence_mapping_reference.build_sentence_mapping(*arguments), strict=True)
    assert len(found) >= 20000
    assert found[:, 0].min() >= bounds[1000]


def test_one_sample_in_so_many_rounds_halves_up():
    assert [sentence_mapping.short_ratio(p) for p in (0, 1, 0.4, 2 / 3, 0.1, 0.3)] == [0, 1, 3, 2, 10, 3]
    assert sentence_mapping.short_ratio(5e-324) == 2**62


def test_a_document_of_one_long_sentence_is_kept_and_of_several_is_not(build):
    assert build(*arrays([[600], [600, 1]]), None, 50, 0.0, 1, 1).tolist() == [[0, 1, 50]]


def test_whole_epochs(build):
    bounds, lengths = arrays([[5, 5]] * 3)
    assert [len(build(bounds, lengths, wanted, 10, 0.0, 1, 2)) for wanted in (None, 1, 3, 4, 7)] == [3, 3, 3, 6, 9]


def test_nothing_usable_gives_no_rows_and_ends(build):
    assert build(*arrays([[5], [5]]), 100, 10, 0.1, 1, 2).shape == (0, 3)
    assert build(*arrays([]), 100, 10, 0.1, 1, 1).shape == (0, 3)


@pytest.mark.parametrize("bounds", [[0, 4], [2, 1], [-1, 1]])
def test_documents_outside_of_the_sentences_are_refused(build, bounds):
    with pytest.raises(ValueError, match=r"document 0 has sentences .*, which are not among 3"):
        build(np.array(bounds), np.array([1, 2, 3]), 1, 10, 0.1, 1, 1)


def test_too_short_samples_are_refused(build):
    with pytest.raises(ValueError, match="max_length must be 2 at least"):
        build(*arrays([[5]]), 1, 1, 0.1, 1, 1)
