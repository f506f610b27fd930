"""The digest of what datasets hold: another for any change that it claims to see, and none for other names."""

import os
import shutil

import numpy as np
import pytest
from small_data import write_dataset

from megallm.config import parse_arguments, resolve
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.content import TOKENS_AT_A_PLACE, content_digest
from megallm.train.datasets import build_datasets, build_tokenizer_of

DOCUMENTS = [[5, 6, 7, 0], [1, 2, 0], [9, 9, 9, 9, 9, 0]]
CHANGED = {
    "a document more": [*DOCUMENTS, [3, 0]],
    "a document less": DOCUMENTS[:-1],
    "another order": DOCUMENTS[::-1],
    "ends elsewhere": [[5, 6, 7], [0, 1, 2, 0], [9, 9, 9, 9, 9, 0]],
    "a token": [[5, 6, 8, 0], *DOCUMENTS[1:]],
}


def digest(*datasets):
    return content_digest(iter(datasets), len(datasets))


@pytest.mark.parametrize("what", CHANGED)
def test_changes_are_seen(tmp_path, what):
    before = digest(write_dataset(tmp_path / "a", DOCUMENTS))
    assert digest(write_dataset(tmp_path / "a", CHANGED[what])) != before
    assert digest(write_dataset(tmp_path / "a", DOCUMENTS)) == before


def test_names_and_ways_of_reading_do_not_count_and_the_order_of_datasets_does(tmp_path):
    a, b = write_dataset(tmp_path / "a", DOCUMENTS), write_dataset(tmp_path / "b", CHANGED["another order"])
    for ending in (".bin", ".idx"):
        shutil.copy(tmp_path / f"a{ending}", tmp_path / f"c{ending}")
    assert digest(IndexedDataset(tmp_path / "c", mmap=False)) == digest(a)
    assert digest(a, b) != digest(b, a)
    wide = write_dataset(tmp_path / "wide", DOCUMENTS, vocab_size=100_000)
    assert digest(wide) != digest(a)


@pytest.mark.parametrize("count", [1, 40])
def test_both_ends_of_large_data_are_read_and_little_between(tmp_path, monkeypatch, count):
    length = 200 * TOKENS_AT_A_PLACE
    tokens = np.arange(length) % 97
    read = []
    original = IndexedDataset.read_tokens
    monkeypatch.setattr(IndexedDataset, "read_tokens", lambda *of: read.append(of[1:]) or original(*of))
    before = content_digest([write_dataset(tmp_path / "a", [tokens])], count)
    assert len(read) == (64 if count == 1 else 2)
    assert all(stop - start == TOKENS_AT_A_PLACE for start, stop in read)
    for place in (0, length - 1):
        other = tokens.copy()
        other[place] = 98
        assert content_digest([write_dataset(tmp_path / "a", [other])], count) != before


def test_data_without_tokens_has_a_digest(tmp_path):
    empty = write_dataset(tmp_path / "a", [[], []])
    assert digest(empty) != digest(write_dataset(tmp_path / "b", [[1]]))
    assert digest(empty) != digest(empty, empty)


@pytest.mark.parametrize("weights", [(), ("0.5",)])
def test_a_run_knows_what_its_training_data_holds(tmp_path, weights):
    flags = [
        *("--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "4"),
        *("--micro-batch-size", "1", "--global-batch-size", "1", "--lr", "1e-3", "--train-iters", "2"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "99", "--split", "100,0,0"),
        *("--data-path", *weights, str(tmp_path / "a")),
    ]
    contents = []
    for documents in (DOCUMENTS, CHANGED["a token"], DOCUMENTS):
        write_dataset(tmp_path / "a", documents)
        os.utime(tmp_path / "a.idx", ns=(0, len(contents)))
        config = resolve(parse_arguments(flags, prog="run", description=""), 1)
        contents.append(build_datasets(config, build_tokenizer_of(config)).content)
    assert contents[0] == contents[2] != contents[1]
    assert contents[0]
