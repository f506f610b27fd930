"""Reading the tokens of samples: native and reference alike, every index checked, and files that shrink or go away."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import GOLDEN_DOCUMENTS, write_dataset

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.writer import IndexedDatasetWriter
from megallm.data.samples import fetch
from megallm.data.samples.gpt import GPTDataset, GPTDatasetSettings

KINDS = ["native", "reference"]
DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16"]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Each test runs with the compiled functions and with those in numpy."""
    if request.param == "reference":
        monkeypatch.setattr(fetch, "_native", None)
    elif fetch._native is None:
        pytest.skip("the native functions are not built")
    return request.param


def fetch_rows(dataset, documents, starts, samples, places, text, dtype=np.int32, order=np.uint32):
    """Samples by way of a shuffled order that has them at its end."""
    shuffle_index = np.array([0, *samples], order)
    reader = fetch.sample_reader(dataset, np.array(documents, np.int32), np.array(starts, dtype), shuffle_index)
    assert isinstance(reader, fetch.SampleReader) == (fetch._native is None)
    return fetch.fetch_samples(dataset, reader, np.arange(len(samples)) + 1, np.array(places), text, -3)


def read(dataset, documents, starts, samples, width, dtype=np.int32, order=np.int64):
    """Samples into the rows from the last one up; what is found, the first sample's first."""
    text = np.full((len(samples), width), -7, np.int64)
    found = fetch_rows(dataset, documents, starts, samples, np.arange(len(samples))[::-1].copy(), text, dtype, order)
    return text[::-1].tolist(), found


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(("dtype", "order"), [(np.int32, np.uint32), (np.int64, np.int64)])
def test_samples_cross_documents(golden, kind, mmap, dtype, order):
    dataset = IndexedDataset(golden.path_prefix, mmap=mmap)
    text, found = read(dataset, [1, 0, 1, 2], [[0, 1], [1, 3], [3, 4]], [1, 0], 5, dtype, order)
    assert text == [[0, 1, 2, 0, 9], [2, 0, 5, 6, 7]]
    assert found == (0, 9, 0)


def test_a_sample_that_runs_over_the_end(golden, kind):
    text, found = read(golden, [1, 3], [[0, 2], [1, 1]], [0, 1], 4)
    assert text == [[0, 3, 0, -3], [0, -3, -3, -3]]
    assert found == (0, 3, 4)


def test_no_samples(golden, kind):
    text, (lowest, highest, missing) = read(golden, [1], [[0, 0]], [], 4)
    assert text == []
    assert lowest > highest
    assert missing == 0


@pytest.mark.parametrize("name", DTYPES)
def test_every_width_of_tokens(tmp_path, kind, name):
    """Blocks of 64 KiB are read one after another; the values at both ends of the type survive."""
    limits = np.iinfo(name)
    tokens = np.resize(np.array([limits.max, 1, limits.min, 2], name), 70_001)
    with IndexedDatasetWriter(tmp_path / "x", np.dtype(name)) as writer:
        writer.add_document(tokens)
    text = np.empty((1, 70_000), np.int64)
    found = fetch_rows(IndexedDataset(tmp_path / "x"), [0], [[0, 1]], [0], [0], text)
    assert np.array_equal(text[0], tokens[1:].astype(np.int64))
    assert found == (limits.min, limits.max, 0)


@pytest.mark.parametrize(
    ("documents", "starts", "samples", "message"),
    [
        ([0, 5], [[0, 3]], [0], "document 5 is not among 5 sequences"),
        ([-1], [[0, 0]], [0], "document -1 is not among 5 sequences"),
        ([0], [[0, 5]], [0], "token 5 is not within document 0 of 4 tokens"),
        ([0], [[-1, 0]], [0], "a sample starts at a negative place"),
        ([0], [[0, -1]], [0], "a sample starts at a negative place"),
        ([0], [[0, 0]], [1], "sample 1 is not among 1"),
        ([0], [[0, 0]], [-1], "sample -1 is not among 1"),
    ],
)
def test_every_index_is_checked(golden, kind, documents, starts, samples, message):
    with pytest.raises(ValueError, match=message):
        read(golden, documents, starts, samples, 4)


def test_rows_are_checked(golden, kind):
    for row in (-1, 1):
        with pytest.raises(ValueError, match=f"row {row} is not among 1"):
            fetch_rows(golden, [0], [[0, 0]], [0], [row], np.empty((1, 3), np.int64))


def test_a_sample_that_is_not_there(golden, kind):
    dataset = GPTDataset(golden, 0, len(golden), None, GPTDatasetSettings(4))
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"golden: there are samples 0 to {len(dataset) - 1}, not {index}"):
            dataset.get_batch([0, index])


def test_arrays_of_another_form_are_refused(golden):
    if fetch._native is None:
        pytest.skip("the native functions are not built")
    documents, starts, order = np.zeros(1, np.int32), np.zeros((1, 2), np.int32), np.zeros(1, np.uint32)
    with pytest.raises(ValueError, match=r"sample_index must be \[samples, 2\]"):
        fetch.sample_reader(golden, documents, np.zeros((1, 3), np.int32), order)
    with pytest.raises(ValueError, match=r"shuffle_index must be \[samples\]"):
        fetch.sample_reader(golden, documents, starts, np.zeros(1, np.int32))
    reader = fetch.sample_reader(golden, documents, starts, order)
    with pytest.raises(ValueError, match=r"one row for each sample"):
        reader.fetch(np.zeros(2, np.int64), np.zeros(1, np.int64), np.zeros((1, 3), np.int64), -1)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_shrinks_is_an_error_message(tmp_path, kind, mmap):
    write_dataset(tmp_path / "x", GOLDEN_DOCUMENTS * 1000)
    dataset = GPTDataset(IndexedDataset(tmp_path / "x", mmap=mmap), 0, 5000, None, GPTDatasetSettings(8))
    dataset.get_batch([0, 1])
    os.truncate(tmp_path / "x.bin", 100)
    with pytest.raises(ValueError, match=r"x\.bin shrank while it was in use: it has 100 bytes now, and had 38000"):
        dataset.get_batch(range(100))


def test_a_mapped_index_that_shrinks_is_an_error_message(tmp_path, kind):
    write_dataset(tmp_path / "x", GOLDEN_DOCUMENTS * 1000)
    dataset = GPTDataset(IndexedDataset(tmp_path / "x"), 0, 5000, None, GPTDatasetSettings(8))
    dataset.get_batch([0, 1])
    os.truncate(tmp_path / "x.idx", 100)
    with pytest.raises(ValueError, match=r"x\.idx shrank while it was in use: it has 100 bytes now, and had 100042"):
        dataset.get_batch(range(100))


def test_a_file_that_cannot_be_read(golden, kind, monkeypatch):
    monkeypatch.setattr(golden, "sizes_at_opening", list)
    monkeypatch.setattr(golden, "file_descriptor", os.open(os.path.dirname(golden.path_prefix), os.O_RDONLY))
    with pytest.raises(ValueError, match=r"golden.bin cannot be read: Is a directory"):
        read(golden, [0], [[0, 0]], [0], 4)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 9).flatmap(lambda width: st.lists(st.lists(st.integers(0, 3), min_size=width, max_size=width))),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_documents_are_marked_alike(rows, losses, positions, documents):
    if fetch._native is None:
        pytest.skip("the native functions are not built")
    text = np.array(rows, np.int64).reshape(len(rows), -1 if rows else 4)
    shape = (len(text), text.shape[1] - 1)
    results = []
    for function in (fetch._native.mark_documents, fetch.mark_documents_reference):
        arrays = [
            np.ones(shape if losses else 0, np.float32),
            np.full(shape if positions else 0, -1, np.int64),
            np.full(shape if documents else 0, -1, np.int64),
        ]
        function(text, 0, *arrays)
        results.append([array.tolist() for array in arrays])
    assert results[0] == results[1]
