"""Which files an input names, and the bytes that packed ones hold."""

import gzip
import io
import lzma
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from megallm.data.text.compression import READ_BLOCK, open_stream
from megallm.data.text.inputs import find_inputs, kind_of

zstandard = pytest.importorskip("zstandard")
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
PACKED = [ending for ending in PACK if ending]
TEXT = b"".join(b"line %d of a text that packs a little\n" % number for number in range(20000))


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.json.gz", "sub/c.txt", "sub/.d.txt", ".hidden/e.txt", "notes.md", "sub/f.parquet"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def names(paths, folder):
    return [str(path.relative_to(folder)) for path in paths]


def test_folders_give_their_known_files_in_order(folder):
    assert names(find_inputs([str(folder)]), folder) == ["a.json.gz", "b.jsonl", "sub/c.txt", "sub/f.parquet"]


def test_patterns_give_their_files_in_order(folder):
    assert names(find_inputs([f"{folder}/*.json*"]), folder) == ["a.json.gz", "b.jsonl"]
    assert names(find_inputs([f"{folder}/**/*.txt", f"{folder}/b.jsonl"]), folder) == ["sub/c.txt", "b.jsonl"]
    assert names(find_inputs([f"{folder}/s*"]), folder) == ["sub/c.txt", "sub/f.parquet"]


def test_what_preprocessing_wrote_is_no_text(folder):
    """An output that lies among its input: found by a folder or a pattern, it would be another input when resumed."""
    for name in ("b.preprocessing/journal.json", "b_text_document.tokenizer.json", "sub/x.preprocessing/y.json"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
    assert names(find_inputs([str(folder)]), folder) == ["a.json.gz", "b.jsonl", "sub/c.txt", "sub/f.parquet"]
    assert names(find_inputs([f"{folder}/*.json*"]), folder) == ["a.json.gz", "b.jsonl"]
    assert names(find_inputs([f"{folder}/**/*.json*"]), folder) == ["a.json.gz", "b.jsonl"]
    named = folder / "b_text_document.tokenizer.json"
    assert find_inputs([str(named)]) == [named]


def test_a_name_that_looks_like_a_pattern_is_a_file_first(folder):
    (folder / "[b].jsonl").write_bytes(b"")
    assert names(find_inputs([f"{folder}/[b].jsonl"]), folder) == ["[b].jsonl"]


def test_standard_input_is_a_name():
    assert find_inputs(["-"]) == [Path("-")]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["{}/c.jsonl"], r"c.jsonl is not there; the nearest name is .*/b.jsonl"),
        (["{}/zzzzzzzzzzz.q"], "has nothing of a like name"),
        (["{}/no/where/a.jsonl"], "nearest folder that exists is"),
        (["{}/b.jsonl", "{}/*.jsonl"], "named twice, by '.*b.jsonl' and by '.*jsonl'"),
        (["{}/notes.md"], r"notes.md is of an unknown kind; read are .jsonl, .json and .txt"),
        (["{}/x*"], "No file matches the pattern"),
        (["{}/bare"], "has no file of a known kind"),
        (["/dev/null"], "/dev/null is a pipe or a device: lead it to the standard input, which is --input -"),
        (["-", "-"], "named twice"),
        ([], "There is no input"),
    ],
)
def test_mistakes_are_sentences(folder, inputs, message):
    (folder / "bare").mkdir()
    with pytest.raises(ValueError, match=message):
        find_inputs([name.format(folder) for name in inputs])


def test_two_links_to_one_file_are_one_file(folder):
    (folder / "link.jsonl").symlink_to(folder / "b.jsonl")
    with pytest.raises(ValueError, match="named twice"):
        find_inputs([str(folder)])


def test_kinds():
    assert kind_of(Path("a.b.JSONL.zst")) == (".jsonl", ".zst")
    assert kind_of(Path("a.txt")) == (".txt", "")
    with pytest.raises(ValueError, match="packs its columns itself"):
        kind_of(Path("a.parquet.gz"))
    with pytest.raises(ValueError, match="unknown kind"):
        kind_of(Path("a.gz"))


@pytest.mark.parametrize("ending", PACK)
def test_streams_give_the_unpacked_bytes(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](TEXT))
    with open_stream(path) as stream:
        assert stream.read() == TEXT
        assert stream.tell() == len(TEXT)


@pytest.mark.parametrize("ending", PACKED)
def test_several_packed_parts_in_one_file_are_all_read(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](TEXT) + PACK[ending](b"") + PACK[ending](b"x") * 30)
    with open_stream(path) as stream:
        assert stream.read() == TEXT + b"x" * 30


@pytest.mark.parametrize("ending", PACKED)
def test_a_file_that_is_cut_off_is_named_with_the_place(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    whole = PACK[ending](TEXT)
    for length, read in ((1, "0"), (len(whole) // 2, r"[\d,]+"), (len(whole) - 1, r"[1-9]\d\d,\d\d\d")):
        path.write_bytes(whole[:length])
        with (
            open_stream(path) as stream,
            pytest.raises(ValueError, match=rf"a.txt{ending} is (cut off|damaged).*after {read} bytes"),
        ):
            list(iter(partial(stream.read, READ_BLOCK), b""))


@pytest.mark.parametrize("ending", PACKED)
def test_a_file_that_is_damaged_is_named_with_the_place(tmp_path, ending):
    """A byte of the data, the checksum, or rubbish behind the end."""
    path = tmp_path / f"a.txt{ending}"
    pack = zstandard.ZstdCompressor(write_checksum=True).compress if ending == ".zst" else PACK[ending]
    whole = bytearray(pack(TEXT))
    for place in (0, len(whole) // 2, len(whole) - 6 if ending == ".gz" else len(whole) - 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        path.write_bytes(damaged)
        with open_stream(path) as stream, pytest.raises(ValueError, match=f"a.txt{ending} is (cut off|damaged)"):
            stream.read()
    path.write_bytes(whole + b"rubbish")
    with open_stream(path) as stream, pytest.raises(ValueError, match=r"damaged|cut off"):
        stream.read()


def test_unpacking_holds_little_however_much_a_file_unpacks_to(tmp_path):
    """200 MB of one letter are a few KB when packed."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"x" * 200_000_000))
    tracemalloc.start()
    with open_stream(path) as stream:
        size = 0
        while block := stream.read(2**20):
            size += len(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 200_000_000
    assert peak < 80_000_000


def test_standard_input_is_read_and_left_open(monkeypatch):
    source = io.BytesIO(b"abc")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))
    with open_stream(Path("-")) as stream:
        assert stream.read() == b"abc"
    assert not source.closed


def test_a_file_that_cannot_be_opened_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        open_stream(tmp_path / "a.jsonl")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match="pip install zstandard"):
        open_stream(path)
