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


def read(dataset, documents, starts, samples, width, dtype=np.int32):
    """Samples into the rows from the last one up; what is found, the first sample's first."""
    text = np.full((len(samples), width), -7, np.int64)
    rows = np.arange(len(samples))[::-1].copy()
    found = fetch.fetch_samples(
        dataset, np.array(documents, np.int32), np.array(starts, dtype), np.array(samples, np.int64), rows, text
    )
    return text[::-1].tolist(), found[0].tolist(), found[1:]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_samples_cross_documents(golden, kind, mmap, dtype):
    dataset = IndexedDataset(golden.path_prefix, mmap=mmap)
    text, counts, extremes = read(dataset, [1, 0, 1, 2], [[0, 1], [1, 3], [3, 4]], [1, 0], 5, dtype)
    assert text == [[0, 1, 2, 0, 9], [2, 0, 5, 6, 7]]
    assert counts == [5, 5]
    assert extremes == (0, 9)


def test_a_sample_that_runs_over_the_end(golden, kind):
    text, counts, extremes = read(golden, [1, 3], [[0, 2], [1, 1]], [0, 1], 4)
    assert text == [[0, 3, 0, -7], [0, -7, -7, -7]]
    assert counts == [3, 1]
    assert extremes == (0, 3)


@pytest.mark.parametrize("name", DTYPES)
def test_every_width_of_tokens(tmp_path, kind, name):
    """Blocks of 64 KiB are read one after another; the values at both ends of the type survive."""
    limits = np.iinfo(name)
    tokens = np.resize(np.array([limits.max, 1, limits.min, 2], name), 70_001)
    with IndexedDatasetWriter(tmp_path / "x", np.dtype(name)) as writer:
        writer.add_document(tokens)
    text = np.empty((1, 70_000), np.int64)
    arguments = (
        IndexedDataset(tmp_path / "x"),
        np.zeros(1, np.int32),
        np.array([[0, 1]], np.int32),
        np.zeros(1, np.int64),
    )
    counts, lowest, highest = fetch.fetch_samples(*arguments, np.zeros(1, np.int64), text)
    assert np.array_equal(text[0], tokens[1:].astype(np.int64))
    assert (counts.tolist(), lowest, highest) == ([70_000], limits.min, limits.max)


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
            fetch.fetch_samples(
                golden,
                np.zeros(1, np.int32),
                np.zeros((1, 2), np.int32),
                np.zeros(1, np.int64),
                np.array([row]),
                np.empty((1, 3), np.int64),
            )


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_shrinks_is_an_error_message(tmp_path, kind, mmap):
    write_dataset(tmp_path / "x", GOLDEN_DOCUMENTS * 1000)
    dataset = GPTDataset(IndexedDataset(tmp_path / "x", mmap=mmap), 0, 5000, None, GPTDatasetSettings(8))
    dataset.get_batch([0, 1])
    os.truncate(tmp_path / "x.bin", 100)
    with pytest.raises(ValueError, match=r"x\.bin shrank while it was in use: it has 100 bytes now, and had 38000"):
        dataset.get_batch(range(100))


def test_a_file_that_cannot_be_read(golden, kind, monkeypatch):
    monkeypatch.setattr(golden, "check_size", lambda: None)
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
