"""Samples in Megatron's order: golden vectors, and an independent slow reference over random datasets."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import GOLDEN_DOCUMENTS, write_dataset

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.gpt import GPTDataset, GPTDatasetSettings, make_batch
from megallm.data.samples.order import EpochPlan, build_sample_order, plan_epochs

SETTINGS = GPTDatasetSettings(sequence_length=4, seed=1234)
# Samples asked for; document, sample and shuffle index.
GOLDEN = {
    4: ([4, 0, 1, 2, 3], [[0, 0], [1, 0], [2, 0], [3, 1], [3, 5]], [2, 1, 3, 0]),
    9: (
        [2, 2, 4, 1, 0, 3, 4, 0, 1, 3],
        [[0, 0], [0, 4], [1, 2], [2, 0], [3, 0], [4, 1], [5, 1], [6, 3], [7, 3], [9, 0]],
        [7, 3, 5, 1, 4, 8, 0, 2, 6],
    ),
    10: (
        [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1],
        None,
        [7, 3, 5, 1, 4, 8, 0, 2, 6, 13, 10, 12, 9, 11],
    ),
}


@pytest.mark.parametrize("num_samples", GOLDEN)
def test_golden_indices(golden, num_samples):
    documents, starts, shuffle = GOLDEN[num_samples]
    dataset = GPTDataset(golden, 0, 5, num_samples, SETTINGS)
    assert dataset.document_index.tolist() == documents
    assert starts is None or dataset.sample_index.tolist() == starts
    assert dataset.shuffle_index.tolist() == shuffle
    assert dataset.document_index.dtype == dataset.sample_index.dtype == np.int32
    assert dataset.shuffle_index.dtype == np.uint32
    assert len(dataset) == len(shuffle)


def test_golden_sample(golden):
    sample = GPTDataset(golden, 0, 5, 4, SETTINGS)[0]
    assert sample["tokens"].tolist() == [1, 2, 0, 9]
    assert sample["labels"].tolist() == [2, 0, 9, 9]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3]
    assert sample["loss_mask"].tolist() == [1, 1, 1, 1]
    assert {name: array.dtype.name for name, array in sample.items()} == {
        "tokens": "int64",
        "labels": "int64",
        "loss_mask": "float32",
        "position_ids": "int64",
    }


def slow_order(lengths, first, last, sequence_length, num_samples, seed):
    """Megatron's rule, written down once more: epochs one by one, arrays of their own, starts token by token."""
    total = sum(lengths[first:last])
    epochs = 1
    while num_samples is not None and epochs * total < num_samples * sequence_length + 1:
        epochs += 1
    count = (epochs * total - 1) // sequence_length
    separate, before = False, count
    if epochs > 1:
        before = ((epochs - 1) * total - 1) // sequence_length
        separate = num_samples - before < int(0.8 * ((total - 1) // sequence_length))
    random = np.random.RandomState(seed)

    def shuffled(values):
        array = np.array(list(values), np.int64)
        random.shuffle(array)
        return array.tolist()

    if separate:
        documents = shuffled(list(range(first, last)) * (epochs - 1))
        documents += shuffled(range(first, last))
        order = shuffled(range(before))
        order += shuffled(range(before, count))
    else:
        documents = shuffled(list(range(first, last)) * epochs)
        order = shuffled(range(count))
    return documents, order


@st.composite
def datasets(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=2, max_size=10))
    first = draw(st.integers(0, len(lengths) - 1))
    last = draw(st.integers(first + 1, len(lengths)))
    return lengths, first, last, draw(st.integers(1, 9)), draw(st.integers(1, 60)), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=200, deadline=None)
@given(datasets())
def test_order_equals_the_slow_reference(case):
    lengths, first, last, sequence_length, num_samples, seed = case
    found = build_sample_order(np.array(lengths, np.int32), first, last, sequence_length, num_samples, seed)
    documents, order = slow_order(lengths, first, last, sequence_length, num_samples, seed)
    assert found["document_index"].tolist() == documents
    assert found["shuffle_index"].tolist() == order
    assert len(order) >= num_samples


@pytest.mark.parametrize(("from_last", "before_last"), [(1, 100), (79, 100), (80, None), (100, None)])
def test_a_last_epoch_is_dealt_apart_below_four_fifths(from_last, before_last):
    """Of 401 tokens, an epoch has 100 samples of 4; two have 200."""
    assert plan_epochs(401, 4, 100 + from_last) == EpochPlan(2, 200, before_last)


def test_separate_last_epoch_occurs_both_ways():
    """The random cases above are worth something only if both branches are among them."""
    lengths = [5] * 8
    separate = [slow_order(lengths, 0, 8, 2, samples, 1)[1] for samples in range(20, 40)]
    together = [max(order[:19]) >= 19 for order in separate]
    assert any(together)
    assert not all(together)


@settings(max_examples=40, deadline=None)
@given(datasets())
def test_samples_are_cut_from_the_stream(tmp_path_factory, case):
    lengths, first, last, sequence_length, num_samples, seed = case
    documents = [[100 * number + token for token in range(length)] for number, length in enumerate(lengths)]
    indexed = write_dataset(tmp_path_factory.mktemp("cut") / "x", documents, vocab_size=10_000)
    dataset = GPTDataset(indexed, first, last, num_samples, GPTDatasetSettings(sequence_length, seed))
    stream = [token for number in dataset.document_index for token in documents[number]]
    for index in range(len(dataset)):
        start = int(dataset.shuffle_index[index]) * sequence_length
        assert dataset[index]["tokens"].tolist() == stream[start : start + sequence_length]
        assert dataset[index]["labels"].tolist() == stream[start + 1 : start + sequence_length + 1]


def test_a_batch_is_its_samples(golden):
    chosen = replace(SETTINGS, eod_id=0, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    dataset = GPTDataset(golden, 0, 5, 9, chosen)
    for indices in ([3, 0, 0, 8], np.array([5])):
        batch = dataset.get_batch(indices)
        for name, array in batch.items():
            stacked = np.stack([dataset[int(index)][name] for index in indices])
            assert np.array_equal(array, stacked)
            assert array.dtype == stacked.dtype
    with pytest.raises(IndexError, match="samples 0 to 8, not -1"):
        dataset.get_batch([0, -1])


def test_one_epoch_without_a_number_of_samples(golden):
    assert len(GPTDataset(golden, 0, 5, None, SETTINGS)) == 4


EOD, PAD = 0, 7


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([EOD, PAD, 1, 2]), min_size=2, max_size=20), st.booleans(), st.booleans(), st.booleans()
)
def test_masks_and_positions(text, reset_position_ids, reset_attention_mask, eod_mask_loss):
    """Against the definition, token by token."""
    chosen = GPTDatasetSettings(
        len(text) - 1,
        eod_id=EOD,
        pad_id=PAD,
        reset_position_ids=reset_position_ids,
        reset_attention_mask=reset_attention_mask,
        eod_mask_loss=eod_mask_loss,
    )
    batch = make_batch(np.array([text[::-1], text]), chosen, PAD)
    sample = {name: array[1] for name, array in batch.items()}
    position = document = 0
    for number, (token, label) in enumerate(pairwise(text)):
        assert sample["tokens"][number] == (0 if token == PAD else token)
        assert sample["labels"][number] == (0 if label == PAD else label)
        assert sample["loss_mask"][number] == (label != PAD and not (eod_mask_loss and token == EOD))
        assert sample["position_ids"][number] == position
        if reset_attention_mask:
            assert sample["document_ids"][number] == document
        position = 0 if reset_position_ids and token == EOD else position + 1
        document += token == EOD
    assert ("document_ids" in sample) == reset_attention_mask


def test_padding_that_ends_documents_is_no_padding(golden):
    dataset = GPTDataset(golden, 0, 5, 4, replace(SETTINGS, eod_id=0, pad_id=0))
    assert dataset[0]["loss_mask"].tolist() == [1, 1, 1, 1]
    assert GPTDataset(golden, 0, 5, 4, replace(SETTINGS, eod_id=0, pad_id=9))[0]["loss_mask"].tolist() == [1, 1, 0, 0]


def test_mistakes(golden, tmp_path):
    with pytest.raises(ValueError, match=r"has 19 tokens in sequences 0 to 4 of 5, too few .*length of 18 fits"):
        GPTDataset(golden, 0, 5, None, GPTDatasetSettings(sequence_length=19))
    with pytest.raises(ValueError, match="gives it none of its 5 sequences"):
        GPTDataset(golden, 2, 2, 3, SETTINGS)
    with pytest.raises(ValueError, match="golden is not below the vocabulary size 9: the data was made with another"):
        GPTDataset(golden, 0, 5, 4, replace(SETTINGS, vocab_size=9))[0]
    with pytest.raises(ValueError, match="eod_mask_loss needs to know the token that ends a document"):
        GPTDatasetSettings(sequence_length=4, eod_mask_loss=True)
    with pytest.raises(ValueError, match="sequence length is 0"):
        GPTDatasetSettings(sequence_length=0)
    with pytest.raises(IndexError):
        GPTDataset(golden, 0, 5, 4, SETTINGS)[4]


def cached(tmp_path):
    return replace(SETTINGS, cache_path=str(tmp_path / "cache"))


def entries(tmp_path):
    return sorted(path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name[0] != ".")


def same_indices(one, other):
    names = ("document_index", "sample_index", "shuffle_index")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_cache_is_read_again(golden, tmp_path, monkeypatch):
    built = GPTDataset(golden, 0, 5, 10, cached(tmp_path))
    monkeypatch.setattr("megallm.data.samples.gpt.build_sample_order", lambda *_: pytest.fail("built a second time"))
    read = GPTDataset(golden, 0, 5, 10, cached(tmp_path))
    assert isinstance(read.shuffle_index, np.memmap)
    assert same_indices(built, read)


def test_cache_is_keyed_by_content(golden, tmp_path):
    """Another dataset at the same path, and each setting that matters, has an entry of its own; a copy has not."""
    chosen = cached(tmp_path)
    GPTDataset(golden, 0, 5, 10, chosen)
    copied = write_dataset(tmp_path / "copy", GOLDEN_DOCUMENTS)
    GPTDataset(copied, 0, 5, 10, chosen)
    assert len(entries(tmp_path)) == 1
    write_dataset(tmp_path / "golden", [*GOLDEN_DOCUMENTS[:4], [4, 4, 0]])
    changed = IndexedDataset(tmp_path / "golden")
    assert same_indices(GPTDataset(changed, 0, 5, 10, chosen), GPTDataset(changed, 0, 5, 10, SETTINGS))
    GPTDataset(copied, 0, 4, 10, chosen)
    GPTDataset(copied, 0, 5, 9, chosen)
    GPTDataset(copied, 0, 5, 10, replace(chosen, seed=1))
    GPTDataset(copied, 0, 5, 10, replace(chosen, sequence_length=3))
    assert len(entries(tmp_path)) == 6
