"""Any documents in any integer type come back through writer, reader, merge and split, and in Megatron's bytes."""

import json
import os
import struct
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.data.indexed import files, format, index, statistics, transfer
from megallm.data.indexed.compare import first_difference
from megallm.data.indexed.format import DTYPES
from megallm.data.indexed.merge import datasets_in, merge_datasets
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.split import counts_of_shares, split_dataset
from megallm.data.indexed.writer import IndexedDatasetWriter
from megallm.data.tokenizer.record import read_record, record_path, write_record

INTEGERS = {code: dtype for code, dtype in DTYPES.items() if dtype.kind != "f"}
RECORD = {"kind": "null", "checksum": "sha256:1", "vocab_size": 9, "special_tokens": {}, "source": "a", "documents": 2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks so small that a few documents are several of them."""
    monkeypatch.setattr(index, "CHECK_CHUNK", 3)
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 16)
    monkeypatch.setattr("megallm.data.indexed.reader.BLOCK_BYTES", 16)
    monkeypatch.setattr("megallm.data.indexed.writer.CHECK_CHUNK", 3)
    monkeypatch.setattr("megallm.data.indexed.compare.CHECK_CHUNK", 3)
    assert format.CHECK_CHUNK > 3 and files.BLOCK_BYTES > 16


def documents_of(dtype, least=0):
    limits = np.iinfo(dtype)
    sequence = st.lists(st.integers(int(limits.min), int(limits.max)), max_size=5)
    return st.lists(st.lists(sequence, max_size=4), min_size=least, max_size=9)


@st.composite
def a_dataset(draw, least=0):
    code = draw(st.sampled_from(sorted(INTEGERS)))
    return code, draw(documents_of(INTEGERS[code], least))


@st.composite
def several_datasets(draw):
    code = draw(st.sampled_from(sorted(INTEGERS)))
    return code, draw(st.lists(documents_of(INTEGERS[code]), min_size=1, max_size=4))


def slow_bytes(code, documents):
    """Both files, straight from the description of the format."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    offsets = [end * INTEGERS[code].itemsize for end in accumulate(lengths, initial=0)][:-1]
    ends = list(accumulate(map(len, documents), initial=0))
    form = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    tokens = b"".join(struct.pack(f"<{len(part)}{form}", *part) for part in sequences)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(ends))
    return tokens, header + struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(ends)}q", *lengths, *offsets, *ends)


def written(prefix, code, documents, at_once=True):
    with IndexedDatasetWriter(prefix, INTEGERS[code]) as writer:
        if at_once:
            sequences = [sequence for document in documents for sequence in document]
            tokens = np.array([token for sequence in sequences for token in sequence], np.int64)
            writer.add_documents(tokens, [len(part) for part in sequences], [len(document) for document in documents])
        else:
            for document in documents:
                tokens = [token for sequence in document for token in sequence]
                writer.add_document(tokens, [len(sequence) for sequence in document])
    return str(prefix)


def files_of(prefix):
    return tuple(open(f"{prefix}{ending}", "rb").read() for ending in (".bin", ".idx"))


@settings(max_examples=60, deadline=None)
@given(a_dataset(), st.booleans(), st.booleans())
def test_written_and_read(tmp_path_factory, dataset, at_once, mmap):
    code, documents = dataset
    prefix = written(tmp_path_factory.mktemp("x") / "x", code, documents, at_once)
    assert files_of(prefix) == slow_bytes(code, documents)
    read = IndexedDataset(prefix, mmap=mmap)
    assert read.dtype == INTEGERS[code]
    assert (read.mapped is not None) == mmap
    sequences = [sequence for document in documents for sequence in document]
    assert [read[number].tolist() for number in range(len(read))] == sequences
    assert np.diff(read.document_indices).tolist() == [len(document) for document in documents]
    tokens = [token for sequence in sequences for token in sequence]
    assert [token for _, block in read.token_blocks() for token in block.tolist()] == tokens
    for number, document in enumerate(documents):
        assert read.tokens(*read.document_range(number)).tolist() == [token for part in document for token in part]
    places = [
        (number, position)
        for number, document in enumerate(documents)
        for sequence in document
        for position in range(len(sequence))
    ]
    found = [read.place(number) for number in range(len(tokens))]
    assert [(document, position) for document, _, position in found] == places
    assert [int(read.get(sequence, position, 1)[0]) for _, sequence, position in found] == tokens


@settings(max_examples=40, deadline=None)
@given(several_datasets(), st.booleans())
def test_merged(tmp_path_factory, datasets, by_system):
    code, parts = datasets
    folder = tmp_path_factory.mktemp("x")
    prefixes = [written(folder / str(number), code, documents) for number, documents in enumerate(parts)]
    with pytest.MonkeyPatch.context() as patch:
        if not by_system:
            patch.setattr(os, "copy_file_range", lambda *_: 0, raising=False)
        merge_datasets(prefixes, str(folder / "out" / "merged"))
    assert files_of(folder / "out" / "merged") == slow_bytes(code, [document for part in parts for document in part])


@settings(max_examples=40, deadline=None)
@given(a_dataset(least=1), st.data())
def test_split_and_merged_again(tmp_path_factory, dataset, data):
    code, documents = dataset
    cuts = sorted(data.draw(st.sets(st.integers(1, len(documents)), max_size=3)) | {len(documents)})
    counts = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
    folder = tmp_path_factory.mktemp("x")
    whole = written(folder / "whole", code, documents)
    prefixes = [str(folder / f"part{number}") for number in range(len(counts))]
    split_dataset(whole, prefixes, lambda _: counts)
    for prefix, start, end in zip(prefixes, [0, *cuts], cuts, strict=False):
        assert files_of(prefix) == slow_bytes(code, documents[start:end])
    merge_datasets(prefixes, str(folder / "again"))
    assert files_of(folder / "again") == files_of(whole)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(a_dataset(), a_dataset(), st.booleans())
def test_first_difference(tmp_path_factory, one, other, alike):
    """The first document that differs, and the first token in it that does."""
    folder = tmp_path_factory.mktemp("x")
    (code, documents), (_, others) = one, other
    if alike:
        limits = np.iinfo(INTEGERS[code])
        documents = [[[token % 7 for token in sequence] for sequence in document] for document in documents]
        others = [*documents[: len(documents) // 2], *others]
        others = [[[min(token % 7, limits.max) for token in part] for part in document] for document in others]
    else:
        others = documents
    datasets = [IndexedDataset(written(folder / name, code, part)) for name, part in (("a", documents), ("b", others))]
    difference = first_difference(*datasets)
    if documents == others:
        assert difference is None
        return
    first = next(
        (number for number, (a, b) in enumerate(zip(documents, others, strict=False)) if a != b),
        min(len(documents), len(others)),
    )
    assert difference["document"] == first
    if first < min(len(documents), len(others)):
        flat = [[token for sequence in part[first] for token in sequence] for part in (documents, others)]
        position = next((n for n, (a, b) in enumerate(zip(*flat, strict=False)) if a != b), min(map(len, flat)))
        assert difference["position"] == (None if flat[0] == flat[1] else position)


def test_types_alone_may_differ(tmp_path):
    datasets = [IndexedDataset(written(tmp_path / str(code), code, [[[1, 2]]])) for code in (4, 8)]
    assert "stored as int32 and as uint16" in first_difference(*datasets)["what"]


@settings(max_examples=40, deadline=None)
@given(a_dataset())
def test_statistics(tmp_path_factory, dataset):
    code, documents = dataset
    read = IndexedDataset(written(tmp_path_factory.mktemp("x") / "x", code, documents))
    shown = statistics.describe(read)
    flat = [[token for sequence in document for token in sequence] for document in documents]
    for name, lengths in (
        ("document_lengths", [len(document) for document in flat]),
        ("sequence_lengths", [len(sequence) for document in documents for sequence in document]),
    ):
        assert (shown[name]["min"], shown[name]["max"]) == (min(lengths, default=0), max(lengths, default=0))
        for area in shown[name]["histogram"]:
            assert area["count"] == sum(area["from"] <= length <= area["to"] for length in lengths)
        assert sum(area["count"] for area in shown[name]["histogram"]) == len(lengths)
    for report in (statistics.scan_tokens(read, [1, 2], 1, None), statistics.sample_tokens(read, [1, 2], 1, 50)):
        nonempty = [(number, tokens) for number, tokens in enumerate(flat) if tokens]
        assert report.counts == {token: sum(tokens.count(token) for tokens in flat) for token in (1, 2)}
        assert report.documents == len(nonempty)
        assert report.tokens == sum(map(len, flat))
        assert report.ended == sum(tokens[-1] == 1 for _, tokens in nonempty)
        assert report.first_not_ended == next((number for number, tokens in nonempty if tokens[-1] != 1), None)


@pytest.mark.parametrize("wrong", [-1, 7, 100])
def test_ids_are_checked_against_a_vocabulary(tmp_path, wrong):
    tokens = [[[1, 2], [], [3]], [], [[4, 5, 6], [0, 0, wrong]]]
    dataset = IndexedDataset(written(tmp_path / "x", 4, tokens))
    IndexedDataset(written(tmp_path / "y", 4, tokens[:1])).check_ids(7)
    message = rf"x.bin: token 2 of sequence 4 in document 2 \(byte 32\) is {wrong}, but ids .* are 0 to 6"
    with pytest.raises(ValueError, match=message):
        dataset.check_ids(7)


def test_bulk_writing_refuses_what_does_not_fit(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", np.dtype("u2")) as writer:
        writer.add_documents([1, 2], [2], [1, 0])
        with pytest.raises(ValueError, match="Token 65536 does not fit uint16: 0 to 65535; it stands in document 4"):
            writer.add_documents([1, 2, 65536], [1, 1, 1], [2, 0, 1])
        with pytest.raises(ValueError, match="Documents of 2 tokens cannot have sequences of 3"):
            writer.add_documents([1, 2], [3], [1])
        with pytest.raises(ValueError, match="Documents of 2 sequences cannot have 1 sequence lengths"):
            writer.add_documents([1, 2], [2], [2])
    assert files_of(tmp_path / "x") == slow_bytes(8, [[[1, 2]], []])


def test_merging_refuses_other_types_the_output_itself_and_half_datasets(tmp_path):
    a, b = written(tmp_path / "a", 8, [[[1]]]), written(tmp_path / "b", 4, [[[1]]])
    with pytest.raises(ValueError, match=r"stored as uint16 in .*a, but as int32 in .*b"):
        merge_datasets([a, b], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="a would be overwritten while it is read"):
        merge_datasets([a], str(tmp_path / "." / "a"))
    (tmp_path / "b.idx").unlink()
    with pytest.raises(ValueError, match=r"b.idx is missing, although b.bin lies there"):
        datasets_in(tmp_path)
    (tmp_path / "b.bin").unlink()
    written(tmp_path / "a-1", 8, [])
    assert datasets_in(tmp_path) == [str(tmp_path / "a"), str(tmp_path / "a-1")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.bin and no \.idx"):
        datasets_in(tmp_path / "empty")


def test_records_of_the_tokenizer_are_carried_over(tmp_path):
    a, b = (written(tmp_path / name, 8, [[[1]], [[2]]]) for name in "ab")
    write_record(a, RECORD)
    write_record(b, {**RECORD, "source": "b", "documents": 3})
    out = str(tmp_path / "out")
    merge_datasets([a, b], out)
    merged = {key: value for key, value in RECORD.items() if key != "source"} | {"documents": 5}
    assert read_record(out) == merged
    split_dataset(out, [f"{out}0", f"{out}1"], lambda documents: counts_of_shares(documents, [1, 1]))
    assert read_record(f"{out}1") == {key: value for key, value in merged.items() if key != "documents"}
    write_record(b, {**RECORD, "checksum": "sha256:2"})
    with pytest.raises(ValueError, match=r"a and .*b were made with different tokenizers: checksum sha256:1 there"):
        merge_datasets([a, b], out)
    assert json.loads(record_path(out).read_text()) == merged
    # The record of the dataset that was there before would be wrong beside the new one.
    record_path(b).unlink()
    merge_datasets([a, b], out)
    assert read_record(out) is None


def test_shares_of_documents():
    assert counts_of_shares(100, [95, 5]) == [95, 5]
    assert counts_of_shares(10, [1, 1, 1]) == [3, 4, 3]
    with pytest.raises(
        ValueError, match="Part 1 has a share of 1 in 100, which is no whole document of 20; 100 documents"
    ):
        counts_of_shares(20, [99, 1])
    for shares in ([1, 0], [1, -1], [float("nan"), 1], [float("inf")]):
        with pytest.raises(ValueError, match="must be a number above 0"):
            counts_of_shares(20, shares)
