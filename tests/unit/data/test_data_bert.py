"""Samples for BERT: items of Megatron's own class, a slow reference over random datasets, splits, blends, refusals."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_masking import DOCUMENTS, RANDOM_DOCUMENTS, VOCABULARY, bert_sample, flat, sentence_rows, write_sentences

from megallm.config.data_sources import parse_split
from megallm.data.samples import masked
from megallm.data.samples.bert import BERTDataset, BERTDatasetSettings
from megallm.data.samples.blended import BlendedDataset, split_range

SETTINGS = BERTDatasetSettings(sequence_length=16, vocabulary=VOCABULARY, masking_probability=0.3)
# What BERTMaskedWordPieceDataset of megatron-core 0.12.1, as published on PyPI, gave for DOCUMENTS and SETTINGS with
# runs of up to 3 whole words and next sentences: 4 samples of documents 0 to 2.
GOLDEN_ROWS = [[0, 3, 13], [0, 3, 13], [3, 5, 13], [3, 5, 13]]
GOLDEN = {
    0: {
        "tokens": [1, 3, 27, 28, 29, 49, 3, 2, 20, 45, 3, 22, 46, 47, 23, 2],
        "types": [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        "labels": [-1, 26, -1, -1, -1, -1, 30, -1, -1, -1, 21, -1, -1, -1, -1, -1],
        "is_random": 1,
        "padding_mask": [1] * 16,
        "loss_mask": [0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0],
        "truncated": 1,
    },
    2: {
        "tokens": [1, 34, 35, 36, 51, 52, 37, 38, 2, 31, 3, 3, 3, 2, 0, 0],
        "types": [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0],
        "labels": [-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 32, 50, 33, -1, -1, -1],
        "is_random": 1,
        "padding_mask": [1] * 14 + [0] * 2,
        "loss_mask": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
        "truncated": 0,
    },
}


@pytest.fixture
def sentences(tmp_path):
    return write_sentences(tmp_path / "sentences", DOCUMENTS)


def listed(item):
    """What Megatron's items have too."""
    return {name: array.tolist() for name, array in item.items() if name != "position_ids"}


def test_golden_items(sentences):
    dataset = BERTDataset(sentences, 0, 3, 4, SETTINGS)
    assert dataset.sample_index.tolist() == GOLDEN_ROWS
    for index, item in GOLDEN.items():
        assert listed(dataset[index]) == item
    assert dataset[0]["position_ids"].tolist() == list(range(16))
    assert {name: (array.dtype.name, array.shape) for name, array in dataset[0].items()} == {
        "tokens": ("int64", (16,)),
        "position_ids": ("int64", (16,)),
        "types": ("int64", (16,)),
        "labels": ("int64", (16,)),
        "is_random": ("int64", ()),
        "padding_mask": ("int64", (16,)),
        "loss_mask": ("float32", (16,)),
        "truncated": ("int64", ()),
    }


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    documents=RANDOM_DOCUMENTS,
    num_samples=st.one_of(st.none(), st.integers(1, 12)),
    sequence_length=st.integers(8, 60),
    masking_probability=st.floats(0.2, 0.6),
    short_sequence_probability=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    next_sentence=st.booleans(),
    first=st.integers(0, 2),
)
def test_items_are_the_slow_reference_s(documents, num_samples, first, **choices):
    chosen = BERTDatasetSettings(vocabulary=VOCABULARY, **choices)
    first = min(first, len(documents))
    lengths = [[len(sentence) for sentence in document] for document in documents[first:]]
    length, probability = chosen.sequence_length - 3, chosen.short_sequence_probability
    rows = sentence_rows(lengths, num_samples, length, probability, chosen.seed, 2 if chosen.next_sentence else 1)
    with tempfile.TemporaryDirectory() as folder:
        indexed = write_sentences(Path(folder) / "data", documents)
        if not rows:
            with pytest.raises(ValueError, match="gives no samples"):
                BERTDataset(indexed, first, len(documents), num_samples, chosen)
            return
        dataset = BERTDataset(indexed, first, len(documents), num_samples, chosen)
        assert len(dataset) == len(rows)
        contents = flat(documents[first:])
        skipped = sum(len(document) for document in documents[:first])
        for index, (begin, end, target) in enumerate(rows[:20]):
            assert dataset.sample_index[index].tolist() == [begin + skipped, end + skipped, target]
            texts = [list(sentence) for sentence in contents[begin:end]]
            assert listed(dataset[index]) == bert_sample(texts, target, index, chosen)


def test_replacements_have_their_chances(tmp_path):
    documents = [[list(range(12, 40)) * 8, list(range(12, 40)) * 8]]
    chosen = replace(SETTINGS, sequence_length=512, masking_probability=0.5)
    dataset = BERTDataset(write_sentences(tmp_path / "data", documents), 0, 1, 40, chosen)
    batch = dataset.get_batch(range(40))
    found = batch["labels"] >= 0
    text, labels = batch["tokens"][found], batch["labels"][found]
    assert len(labels) > 4000
    # A random token is a special one or the true one now and then.
    assert (text == 3).mean() == pytest.approx(0.8 + 0.1 / 60, abs=0.02)
    assert (text == labels).mean() == pytest.approx(0.1 + 0.1 / 60, abs=0.015)
    assert batch["is_random"].mean() == pytest.approx(0.5, abs=0.25)


def test_batches_are_stacked_items(sentences):
    dataset = BERTDataset(sentences, 0, 3, 4, SETTINGS)
    batch = dataset.get_batch(np.array([3, 0, 0]))
    for name, array in batch.items():
        assert array.tolist() == [dataset[index][name].tolist() for index in (3, 0, 0)]
    with pytest.raises(IndexError, match="has samples 0 to 3, not 4"):
        dataset.get_batch([0, 4])
    with pytest.raises(IndexError, match="not -1"):
        dataset[-1]


def test_splits_cut_between_documents(tmp_path):
    indexed = write_sentences(tmp_path / "data", DOCUMENTS * 4)
    assert BERTDataset.num_elements(indexed) == 12
    seen = []
    for bounds in parse_split("50,25,25"):
        first, last = split_range(bounds, BERTDataset.num_elements(indexed))
        dataset = BERTDataset(indexed, first, last, None, replace(SETTINGS, next_sentence=False))
        seen.append(sorted({int(row[0]) for row in dataset.sample_index}))
    documents = np.asarray(indexed.document_indices)
    for numbers, (first, last) in zip(seen, [(0, 6), (6, 9), (9, 12)], strict=True):
        assert documents[first] <= numbers[0] and numbers[-1] < documents[last]
    assert sum(len(numbers) for numbers in seen) == 12


def test_blends(tmp_path):
    parts = [
        BERTDataset(write_sentences(tmp_path / name, DOCUMENTS[first:]), 0, 3 - first, 12, SETTINGS)
        for name, first in (("one", 0), ("other", 1))
    ]
    blend = BlendedDataset(parts, [0.25, 0.75], 8)
    batch = blend.get_batch(range(8))
    assert batch["dataset_id"].tolist() == blend.dataset_index.tolist()
    for index in range(8):
        item, part = blend[index], parts[blend.dataset_index[index]][int(blend.dataset_sample_index[index])]
        for name, array in part.items():
            np.testing.assert_array_equal(item[name], array, strict=True)
            np.testing.assert_array_equal(batch[name][index], array)


def test_the_cache_is_used_and_keyed_by_all_that_matters(sentences, tmp_path, monkeypatch):
    built = []
    original = masked.build_sentence_mapping

    def counted(*arguments):
        built.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(masked, "build_sentence_mapping", counted)
    cached = replace(SETTINGS, cache_path=str(tmp_path / "cache"))
    first = BERTDataset(sentences, 0, 3, 4, cached)
    again = BERTDataset(sentences, 0, 3, 4, replace(cached, masking_probability=0.2))
    assert len(built) == 1
    np.testing.assert_array_equal(first.sample_index, again.sample_index, strict=True)
    others = [
        (0, 3, 5, cached),
        (0, 2, 4, cached),
        (0, 3, None, cached),
        (0, 3, 4, replace(cached, seed=1)),
        (0, 3, 4, replace(cached, sequence_length=17)),
        (0, 3, 4, replace(cached, short_sequence_probability=0.5)),
        (0, 3, 4, replace(cached, next_sentence=False)),
    ]
    for number, (begin, end, num_samples, chosen) in enumerate(others):
        dataset = BERTDataset(sentences, begin, end, num_samples, chosen)
        assert len(built) == number + 2
        expected = BERTDataset(sentences, begin, end, num_samples, replace(chosen, cache_path=None))
        built.pop()
        np.testing.assert_array_equal(dataset.sample_index, expected.sample_index, strict=True)


def test_documents_without_sentences_are_refused(tmp_path):
    whole = write_sentences(tmp_path / "whole", [[[20, 21, 22]], [[23, 24]], []])
    message = (
        r"whole gives no samples from documents 0 to 2 of 3: each of its 3 documents is one sequence, but 2 sentences"
    )
    with pytest.raises(ValueError, match=message + r" are needed: preprocess the text with --split-sentences"):
        BERTDataset(whole, 0, 3, 1, SETTINGS)
    assert len(BERTDataset(whole, 0, 3, 1, replace(SETTINGS, next_sentence=False))) == 2
    with pytest.raises(ValueError, match="its 1 documents hold no sequences"):
        BERTDataset(whole, 2, 3, 1, SETTINGS)
    with pytest.raises(ValueError, match="its 0 documents hold no sequences"):
        BERTDataset(whole, 1, 1, 1, SETTINGS)
    long = write_sentences(tmp_path / "long", [[[20] * 513, [21]], [[22]]])
    with pytest.raises(
        ValueError, match="each of its 1 documents of 2 sentences or more has one of more than 512 tokens"
    ):
        BERTDataset(long, 0, 2, 1, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": replace(VOCABULARY, mask_id=None)}, "The vocabulary has no mask token, which BERT needs"),
        ({"seed": -1}, "The seed of the data order is -1, but must be in 0 to 4294967295"),
        ({"masking_probability": 1.0}, "The masking probability is 1, but must be between 0 and 1"),
        ({"masking_probability": 0.0}, "The masking probability is 0, but must be between 0 and 1"),
        ({"short_sequence_probability": 1.5}, "The probability of short sequences is 1.5, but must be 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_a_sequence_too_short_is_refused(sentences):
    message = "length is 6, which leaves 3 tokens beside 3 special ones: too few .* of 0.3; it must be 7 at least"
    with pytest.raises(ValueError, match=message):
        BERTDataset(sentences, 0, 3, 1, replace(SETTINGS, sequence_length=6))
    assert BERTDataset(sentences, 0, 3, 1, replace(SETTINGS, sequence_length=7))[0]["loss_mask"].sum() == 1


def test_tokens_of_another_vocabulary_are_refused(sentences):
    small = replace(VOCABULARY, vocab_size=54, continuation_ids=frozenset())
    dataset = BERTDataset(sentences, 0, 3, 1, replace(SETTINGS, vocabulary=small, next_sentence=False))
    with pytest.raises(ValueError, match=r"Token 54 in .*sentences is not below the vocabulary size 54"):
        dataset.get_batch(range(len(dataset)))
