"""Samples for T5: items of Megatron's own class, a slow reference over random datasets, and what does not fit."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_masking import DOCUMENTS, RANDOM_DOCUMENTS, VOCABULARY, flat, sentence_rows, t5_sample, write_sentences

from megallm.data.samples.blended import BlendedDataset
from megallm.data.samples.t5 import T5Dataset, T5DatasetSettings

SETTINGS = T5DatasetSettings(
    sequence_length=16, decoder_sequence_length=12, vocabulary=VOCABULARY, masking_probability=0.3
)
# What T5MaskedWordPieceDataset of megatron-core 0.12.1, as published on PyPI, gave for DOCUMENTS and SETTINGS with
# whole words in runs of a geometric length up to 10: 4 samples of documents 0 to 2.
GOLDEN_ROWS = [[5, 6, 14], [3, 5, 14], [0, 3, 14], [5, 6, 14], [3, 5, 14], [0, 3, 14]]
GOLDEN = {
    1: {
        "text_enc": [8, 9, 33, 34, 35, 36, 51, 52, 37, 38, 0, 0, 0, 0, 0, 0],
        "text_dec": [4, 8, 31, 9, 32, 50, 0, 0, 0, 0, 0, 0],
        "labels": [8, 31, 9, 32, 50, 5, -1, -1, -1, -1, -1, -1],
        "loss_mask": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        "truncated": 0,
        "enc_mask": [1] * 10 + [0] * 6,
        "dec_mask": [1] * 6 + [0] * 6,
    },
    2: {
        "text_enc": [20, 45, 21, 8, 24, 25, 48, 26, 27, 28, 29, 0, 0, 0, 0, 0],
        "text_dec": [4, 8, 22, 46, 47, 23, 0, 0, 0, 0, 0, 0],
        "labels": [8, 22, 46, 47, 23, 5, -1, -1, -1, -1, -1, -1],
        "loss_mask": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        "truncated": 1,
        "enc_mask": [1] * 11 + [0] * 5,
        "dec_mask": [1] * 6 + [0] * 6,
    },
}


@pytest.fixture
def sentences(tmp_path):
    return write_sentences(tmp_path / "sentences", DOCUMENTS)


def listed(item):
    return {name: array.tolist() for name, array in item.items()}


def test_golden_items(sentences):
    dataset = T5Dataset(sentences, 0, 3, 4, SETTINGS)
    assert dataset.sample_index.tolist() == GOLDEN_ROWS
    for index, item in GOLDEN.items():
        assert listed(dataset[index]) == item
    assert {name: (array.dtype.name, array.shape) for name, array in dataset[0].items()} == {
        "text_enc": ("int64", (16,)),
        "text_dec": ("int64", (12,)),
        "labels": ("int64", (12,)),
        "loss_mask": ("float32", (12,)),
        "truncated": ("int64", ()),
        "enc_mask": ("int64", (16,)),
        "dec_mask": ("int64", (12,)),
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
)
def test_items_are_the_slow_reference_s(documents, num_samples, **choices):
    vocabulary = replace(VOCABULARY, sentinel_ids=tuple(range(8, 60)))
    chosen = T5DatasetSettings(vocabulary=vocabulary, decoder_sequence_length=80, **choices)
    lengths = [[len(sentence) for sentence in document] for document in documents]
    length, probability = chosen.sequence_length - 2, chosen.short_sequence_probability
    rows = sentence_rows(lengths, num_samples, length, probability, chosen.seed, 1)
    if not rows:
        return
    with tempfile.TemporaryDirectory() as folder:
        indexed = write_sentences(Path(folder) / "data", documents)
        dataset = T5Dataset(indexed, 0, len(documents), num_samples, chosen)
        assert dataset.sample_index.tolist() == rows
        contents = flat(documents)
        for index, (begin, end, target) in enumerate(rows[:20]):
            assert listed(dataset[index]) == t5_sample(contents[begin:end], target, index, chosen)


def test_nothing_is_lost_between_encoder_and_decoder(tmp_path):
    documents = [[list(range(20, 48)), list(range(48, 53))]]
    vocabulary = replace(VOCABULARY, sentinel_ids=tuple(range(8, 20)))
    chosen = replace(
        SETTINGS,
        vocabulary=vocabulary,
        sequence_length=40,
        decoder_sequence_length=40,
        short_sequence_probability=0.0,
    )
    dataset = T5Dataset(write_sentences(tmp_path / "data", documents), 0, 1, 20, chosen)
    for index in range(20):
        item = dataset[index]
        encoder = item["text_enc"][item["enc_mask"] == 1].tolist()
        decoder = item["text_dec"][item["dec_mask"] == 1].tolist()
        assert decoder[0] == 4
        assert item["labels"][item["loss_mask"] == 1].tolist() == [*decoder[1:], 5]
        runs, sentinel = {}, None
        for token in decoder[1:]:
            if token in vocabulary.sentinel_ids:
                sentinel = token
            runs.setdefault(sentinel, []).append(token)
        assert list(runs) == list(vocabulary.sentinel_ids[: len(runs)])
        assert flat(runs.get(token, [token, token])[1:] for token in encoder) == flat(documents[0])


def test_batches_and_blends(sentences):
    dataset = T5Dataset(sentences, 0, 3, 4, SETTINGS)
    batch = dataset.get_batch([1, 2])
    for name, array in batch.items():
        assert array.tolist() == [GOLDEN[1][name], GOLDEN[2][name]]
    blend = BlendedDataset([dataset, T5Dataset(sentences, 1, 3, 4, SETTINGS)], [1, 1], 6)
    assert blend.get_batch(range(6))["dataset_id"].tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(blend[2]["text_enc"], dataset[1]["text_enc"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": replace(VOCABULARY, bos_id=None)}, "The vocabulary has no bos token, which T5 needs"),
        (
            {"vocabulary": replace(VOCABULARY, sentinel_ids=())},
            "has no sentinel tokens, which T5 needs: give --vocab-ex",
        ),
        (
            {"decoder_sequence_length": 5},
            "length is 5, but of 16 tokens up to 4 are masked at a probability of 0.3, and go there with a beginning "
            "and a sentinel for each run: it must be 6 at least, and 9 is always enough",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_a_sequence_too_short_is_refused(sentences):
    with pytest.raises(
        ValueError, match=r"length is 5, which leaves 3 tokens beside 2 special ones.*must be 6 at least"
    ):
        T5Dataset(sentences, 0, 3, 1, replace(SETTINGS, sequence_length=5))


def test_too_many_runs_are_refused_with_what_is_enough(sentences):
    dataset = T5Dataset(sentences, 0, 3, 4, replace(SETTINGS, vocabulary=replace(VOCABULARY, sentinel_ids=(8,))))
    with pytest.raises(
        ValueError, match="2 masked runs, but the vocabulary has 1 sentinel tokens; --vocab-extra-ids 4 is"
    ):
        dataset[1]
    crowded = replace(SETTINGS, sequence_length=12, decoder_sequence_length=5)
    dataset = T5Dataset(sentences, 0, 3, 60, crowded)
    with pytest.raises(ValueError, match="tokens for the decoder, but its sequence length is 5; 7 is always enough"):
        dataset.get_batch(range(len(dataset)))
    whole = T5Dataset(sentences, 0, 3, 60, replace(crowded, decoder_sequence_length=7))
    assert len(whole.get_batch(range(len(whole)))["labels"]) == len(whole)
