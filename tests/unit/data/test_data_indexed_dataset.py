"""The .bin/.idx files: Megatron's bytes, whole or absent, and nothing broken is read."""

import copy
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import GOLDEN_DOCUMENTS, write_dataset

from megallm.data.indexed.format import DTYPES, token_dtype
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.writer import IndexedDatasetWriter

NO_TORCH = "import sys; import {}; sys.exit('torch' in sys.modules)"


def golden_index() -> bytes:
    """The index of the golden documents, written down field by field."""
    header = bytes.fromhex("4d4d494449445800 00") + struct.pack("<QBQQ", 1, 8, 5, 6)
    return header + struct.pack("<5i5q6q", 4, 3, 6, 2, 4, 0, 8, 14, 26, 30, 0, 1, 2, 3, 4, 5)


def test_golden_bytes(golden, tmp_path):
    index = (tmp_path / "golden.idx").read_bytes()
    assert len(index) == 142
    assert index == golden_index()
    flat = [token for document in GOLDEN_DOCUMENTS for token in document]
    assert (tmp_path / "golden.bin").read_bytes() == struct.pack(f"<{len(flat)}H", *flat)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["golden.bin", "golden.idx"]


def test_reading_golden(golden):
    assert len(golden) == golden.num_documents == 5
    assert golden.num_tokens == 19
    assert [golden[index].tolist() for index in range(5)] == GOLDEN_DOCUMENTS
    assert golden.get(2, 1, 3).tolist() == [9, 9, 9]
    assert golden.get(0, 2).tolist() == [7, 0]
    assert copy.deepcopy(golden)[1].tolist() == [1, 2, 0]
    assert not golden[0].flags.writeable


@pytest.mark.parametrize(("index", "offset", "length"), [(-1, 0, 1), (5, 0, 1), (0, 0, 5), (0, 5, None), (0, -1, 2)])
def test_reading_outside(golden, index, offset, length):
    with pytest.raises(IndexError):
        golden.get(index, offset, length)


def test_dtype_follows_the_vocabulary():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=5), max_size=4), max_size=8),
    st.sampled_from([dtype for dtype in DTYPES.values() if dtype.kind != "f"]),
)
def test_round_trip(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("round") / "trip"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document([token for part in sequences for token in part], [len(part) for part in sequences])
    dataset = IndexedDataset(prefix)
    assert dataset.dtype == dtype
    assert [dataset[index].tolist() for index in range(len(dataset))] == [part for parts in documents for part in parts]
    assert np.diff(dataset.document_indices).tolist() == [len(parts) for parts in documents]


def test_a_document_without_tokens_has_no_sequence(tmp_path):
    dataset = write_dataset(tmp_path / "x", [[1], [], [2, 3]])
    assert dataset.document_indices.tolist() == [0, 1, 1, 2]
    assert dataset.sequence_lengths.tolist() == [1, 2]


def test_writer_leaves_nothing_after_an_error(tmp_path):
    def interrupted():
        with IndexedDatasetWriter(tmp_path / "x", np.dtype("u2")) as writer:
            writer.add_document([1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_writer_keeps_the_old_dataset_until_the_new_one_is_whole(tmp_path):
    write_dataset(tmp_path / "x", [[1, 2]])
    with IndexedDatasetWriter(tmp_path / "x", np.dtype("u2")) as writer:
        writer.add_document([3])
        assert IndexedDataset(tmp_path / "x")[0].tolist() == [1, 2]
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [3]


@pytest.mark.parametrize("tokens", [[65536], [-1]])
def test_writer_refuses_tokens_that_do_not_fit(tmp_path, tokens):
    with pytest.raises(ValueError, match=f"Token {tokens[0]} does not fit uint16"):
        IndexedDatasetWriter(tmp_path / "x", np.dtype("u2")).add_document(tokens)


def test_writer_refuses_lengths_that_do_not_sum(tmp_path):
    with pytest.raises(ValueError, match="3 tokens cannot have sequences of 2"):
        IndexedDatasetWriter(tmp_path / "x", np.dtype("u2")).add_document([1, 2, 3], [1, 1])


BROKEN = {
    "magic": (slice(0, 1), b"X", r"the magic \(byte 0\) is"),
    "version": (slice(9, 17), struct.pack("<Q", 2), r"the version \(byte 9\) is 2, but must be 1"),
    "dtype": (slice(17, 18), b"\x09", r"the dtype code \(byte 17\) is 9, but must be one of"),
    "float": (slice(17, 18), b"\x06", r"the dtype code \(byte 17\) is 6 \(float64\), but must be one of an integer"),
    "width": (slice(17, 18), b"\x04", r"byte offset of sequence 1 \(byte 62\) is 8, but must be 16"),
    "sequences": (slice(18, 26), struct.pack("<Q", 6), "size of the file is 142 bytes, but must be 154"),
    "huge": (slice(18, 26), b"\xff" * 8, "size of the file is 142 bytes"),
    "documents": (
        slice(26, 34),
        struct.pack("<Q", 0),
        r"length of the document array \(byte 26\) is 0, but must be 1 at least",
    ),
    "length": (
        slice(38, 42),
        struct.pack("<i", -3),
        r"the length of sequence 1 \(byte 38\) is -3, but must be 0 at least",
    ),
    "longer": (slice(50, 54), struct.pack("<i", 9), "must be 48, the sum of the lengths"),
    "offset": (slice(62, 70), struct.pack("<q", 9), r"byte offset of sequence 1 \(byte 62\) is 9, but must be 8"),
    "first": (slice(94, 102), struct.pack("<q", 1), r"entry 0 of the document array \(byte 94\) is 1, but must be 0"),
    "falls": (
        slice(118, 126),
        struct.pack("<q", 1),
        r"entry 3 of the document array \(byte 118\) is 1, but must be 2 at least",
    ),
    "last": (
        slice(134, 142),
        struct.pack("<q", 7),
        r"last entry of the document array \(byte 134\) is 7, but must be 5",
    ),
    "short": (slice(140, 142), b"", "size of the file is 140 bytes, but must be 142"),
    "header": (slice(20, 142), b"", "size of the file is 20 bytes, but must be 34 at least"),
    "empty": (slice(0, 142), b"", "size of the file is 0 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_index_is_refused_by_field(golden, tmp_path, name):
    where, replacement, message = BROKEN[name]
    content = bytearray(golden_index())
    content[where] = replacement
    (tmp_path / "golden.idx").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        IndexedDataset(tmp_path / "golden")
    assert str(tmp_path / "golden.") in str(caught.value)


def test_every_changed_byte_of_the_index_is_noticed(golden, tmp_path):
    """A byte of the dtype may become another integer type of the same width; every other change is refused."""
    content = golden_index()
    accepted = []
    for position in range(len(content)):
        for change in (0x01, 0x80):
            changed = bytearray(content)
            changed[position] ^= change
            (tmp_path / "golden.idx").write_bytes(changed)
            try:
                IndexedDataset(tmp_path / "golden")
                accepted.append(position)
            except ValueError:
                pass
    # An inner entry of the document array may grow by one and still not fall: documents without tokens.
    inner = {102, 110, 118, 126}
    assert set(accepted) <= inner


@pytest.mark.parametrize("size", [0, 36, 40])
def test_size_of_the_bin_must_fit(golden, tmp_path, size):
    (tmp_path / "golden.bin").write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match=f"golden.bin: the size of the file is {size} bytes, but must be 38"):
        IndexedDataset(tmp_path / "golden")


def test_missing_files(golden, tmp_path):
    with pytest.raises(ValueError, match=r"without .bin or .idx; in that folder lie .*golden"):
        IndexedDataset(tmp_path / "silver")
    with pytest.raises(
        ValueError, match=r"golden.idx is a file of a dataset; give the path without its ending: .*golden"
    ):
        IndexedDataset(tmp_path / "golden.idx")
    with pytest.raises(ValueError, match=r"is a folder: give the path of a dataset .*; in that folder lie .*golden\.$"):
        IndexedDataset(tmp_path)
    (tmp_path / "other.txt").touch()
    with pytest.raises(ValueError, match=r"is a folder: .*; in that folder lie \S*golden\.$"):
        IndexedDataset(f"{tmp_path}/")
    with pytest.raises(ValueError, match="there is no folder"):
        IndexedDataset(tmp_path / "no" / "golden")
    (tmp_path / "golden.bin").unlink()
    (tmp_path / "golden.bin").mkdir()
    with pytest.raises(ValueError, match=r"golden.bin is a folder, but must be a file"):
        IndexedDataset(tmp_path / "golden")
    (tmp_path / "golden.bin").rmdir()
    with pytest.raises(ValueError, match=r"golden.bin does not exist"):
        IndexedDataset(tmp_path / "golden")


@pytest.mark.parametrize(
    "module",
    ["megallm.data.indexed.reader, megallm.data.indexed.writer", "megallm.data.prepare.job, megallm.data.samples.gpt"],
)
def test_imports_without_torch(module):
    assert subprocess.run([sys.executable, "-c", NO_TORCH.format(module)], check=False).returncode == 0
