"""Which tokens are masked: the draws of a slow reference, and what the rules say."""

import numpy as np
import pytest
import slow_masking
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.data.samples.masking import MaskingVocabulary, WordMasking

VOCABULARY = MaskingVocabulary(
    20, cls_id=1, sep_id=2, mask_id=3, pad_id=0, continuation_ids=frozenset({12, 13, 14, 15, 16})
)


def runs(tokens, probability=0.15, max_words=3, geometric=False, target=None, vocabulary=VOCABULARY, seed=0):
    masking = WordMasking(vocabulary, probability, max_words, geometric)
    generator = np.random.RandomState(seed)
    found = masking.runs(np.array(tokens, np.int64), len(tokens) if target is None else target, generator)
    return [run.tolist() for run in found]


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 19), max_size=60),
    target=st.integers(0, 70),
    probability=st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.15, 0.5])),
    max_words=st.integers(1, 12),
    geometric=st.booleans(),
    whole_words=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_runs_are_the_slow_reference_s(tokens, target, probability, max_words, geometric, whole_words, seed):
    vocabulary = VOCABULARY if whole_words else MaskingVocabulary(20, cls_id=1)
    generators = [np.random.RandomState(seed) for _ in range(2)]
    masking = WordMasking(vocabulary, probability, max_words, geometric)
    found = []
    for run in masking.runs(np.array(tokens, np.int64), target, generators[0]):
        # What is drawn between two runs belongs to the order of draws.
        found.append((run.tolist(), [generators[0].random_sample() for _ in run]))
    drawn = []
    expected = slow_masking.runs(
        tokens,
        vocabulary,
        target,
        generators[1],
        probability,
        max_words,
        geometric,
        lambda position: drawn.append(generators[1].random_sample()),
    )
    assert [run for run, _ in found] == expected
    assert [number for _, numbers in found for number in numbers] == drawn


def test_bounds_are_numpy_s_to_the_last_bit():
    for max_words in range(1, 13):
        chances = 1 / np.arange(1, max_words + 1)
        chances /= chances.sum()
        # What `choice` is given, and what it makes of it.
        given_chances = chances / chances.sum()
        bounds = given_chances.cumsum()
        assert WordMasking(VOCABULARY, 0.1, max_words, False)._bounds == (bounds / bounds[-1]).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_words_are_masked_whole(seed):
    tokens = [1, 5, 12, 13, 6, 2, 7, 14, 8, 8, 15, 2]
    words = [[1, 2, 3], [4], [6, 7], [8], [9, 10]]
    for run in runs(tokens, probability=0.5, seed=seed):
        assert any(run == sum(words[first:last], []) for first in range(5) for last in range(first + 1, 6))  # noqa: RUF017


def test_a_continuation_belongs_to_the_word_before_it_across_a_separator():
    # A text that was cut within a word, behind a separator: as with Megatron.
    assert runs([1, 5, 2, 12, 2], probability=0.5, max_words=1) == [[1, 3]]
    # Without a word before it, it is one of its own.
    assert runs([1, 12, 2], probability=0.5) == [[1]]


@pytest.mark.parametrize("seed", range(5))
def test_no_more_than_the_limit_is_masked_and_never_a_special_token(seed):
    tokens = [1, *[5, 6, 12, 7] * 20, 2]
    masked = [position for run in runs(tokens, seed=seed) for position in run]
    assert len(masked) == len(set(masked)) == 12  # 82 x 0.15, rounded
    assert 0 not in masked and 81 not in masked
    assert len([position for run in runs(tokens, target=40, seed=seed) for position in run]) <= 6


def test_a_target_too_short_masks_nothing():
    assert runs([1, 5, 6, 2], target=6) == []
    assert runs([1, 2], probability=0.5) == []
    assert runs([], probability=0.5) == []


def test_lengths_have_their_chances():
    tokens = list(range(4, 12)) * 1250
    masking = WordMasking(VOCABULARY, 0.01, 3, geometric=False)
    lengths = np.array([masking._draw_words(np.random.RandomState(seed)) for seed in range(4000)])
    shares = [(lengths == count).mean() for count in (1, 2, 3)]
    np.testing.assert_allclose(shares, np.array([6, 3, 2]) / 11, atol=0.03)
    counts = [len(run) for run in runs(tokens, probability=0.3, max_words=10, geometric=True)]
    assert max(counts) == 10
    assert 3 < np.mean(counts) < 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_id": 20}, "mask_id of the vocabulary has token 20, but tokens are 0 to 19"),
        ({"sentinel_ids": (3, -1)}, "sentinel_ids of the vocabulary has token -1"),
        ({"continuation_ids": frozenset({25})}, "continuation_ids of the vocabulary has token 25"),
    ],
)
def test_tokens_outside_of_the_vocabulary_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MaskingVocabulary(20, **values)


def test_missing_tokens_are_named():
    assert VOCABULARY.require("BERT", "cls", "mask") == (1, 3)
    with pytest.raises(ValueError, match="The vocabulary has no bos and no eos token, which T5 needs"):
        VOCABULARY.require("T5", "pad", "bos", "eos")
