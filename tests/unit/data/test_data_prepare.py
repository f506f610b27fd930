"""Preprocessing: bytes equal to a slow reference whatever the options, the workers and the shards."""

import gzip
import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_tool import arguments, files_of, run_job, slow_reference
from small_data import TEXTS

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.prepare import pieces
from megallm.data.prepare.encoding import EncodeSettings
from megallm.data.prepare.settings import JobSettings
from megallm.data.prepare.shards import Shard, merge_shards, parse_shard
from megallm.data.tokenizer.base import TokenizerSettings
from megallm.data.tokenizer.record import read_record

VALUES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", *TEXTS, "One. Two! Three?\nFour."]),
    st.lists(st.text(max_size=10), max_size=4),
)
LINES = st.lists(st.one_of(st.none(), st.tuples(VALUES, VALUES)), min_size=1, max_size=40)


def write_lines(path, lines):
    """A JSON object for each pair of values, and a blank line for each None."""
    rows = [b" " if line is None else json.dumps({"a": line[0], "b": line[1]}).encode() for line in lines]
    content = b"\n".join(rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    files=st.lists(LINES, min_size=1, max_size=3),
    packed=st.booleans(),
    append_eod=st.booleans(),
    sentences=st.booleans(),
    shards=st.integers(1, 4),
    piece_bytes=st.sampled_from([1, 40, 300, 1 << 20]),
)
def test_any_input_gives_the_reference_bytes(tokenizer_json, files, packed, append_eod, sentences, shards, piece_bytes):
    """Whatever files, options, sizes of pieces and shards; in this process."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        folder = Path(name)
        paths = [folder / f"{number}.jsonl{'.gz' if packed and number % 2 else ''}" for number in range(len(files))]
        for path, lines in zip(paths, files, strict=True):
            write_lines(path, lines)
        encode = EncodeSettings(
            TokenizerSettings("HuggingFaceTokenizer", str(tokenizer_json), fast_tokenizer="never"),
            keys=("a", "b"),
            append_eod=append_eod,
            sentence_language="english" if sentences else None,
        )
        rows = [line for lines in files for line in lines if line is not None]
        expected = [slow_reference([row[key] for row in rows], tokenizer_json, append_eod, sentences) for key in (0, 1)]
        if not all(tokens for tokens, _ in expected):
            return
        for number in range(shards):
            shard = Shard(number, shards) if shards > 1 else None
            run_job(JobSettings(tuple(paths), str(folder / "out"), encode, shard), 1)
        if shards > 1:
            merge_shards(str(folder / "out"), ("a", "b"), sentences, shards)
        level = "sentence" if sentences else "document"
        for key, (tokens, index) in zip("ab", expected, strict=True):
            assert (folder / f"out_{key}_{level}.bin").read_bytes() == tokens
            assert (folder / f"out_{key}_{level}.idx").read_bytes() == index
        assert not list(folder.glob("*.preprocessing"))


@pytest.fixture
def mixed_input(tmp_path):
    """Files of several kinds, and the texts of their documents in order."""
    records = [{"text": TEXTS[number % 4] * (number % 3 + 1), "title": f"number {number}"} for number in range(300)]
    records[7]["text"] = ""
    records[8]["text"] = ["one", "", "two"]
    lines = [json.dumps(record).encode() for record in records]
    (tmp_path / "a.jsonl").write_bytes(b"\n \n".join(lines[:120]) + b"\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[120:200])))
    (tmp_path / "c.json").write_text(json.dumps(records[200:], indent=1))
    return [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.json")], records


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers(tool, mixed_input, tokenizer_json, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    paths, records = mixed_input
    for workers in (1, 2, 3):
        command = arguments(tokenizer_json, tmp_path / f"out{workers}", *paths)
        keys = ["--json-keys", "text", "title", "--append-eod"]
        code, out, err = tool("preprocess_data", *command, *keys, "--workers", workers, "--partitions", workers)
        assert code == 0, err
        assert "300 documents" in out
        assert "120 blank lines passed over" in out
        for key in ("text", "title"):
            expected = slow_reference([record[key] for record in records], tokenizer_json, append_eod=True)
            assert files_of(tmp_path / f"out{workers}_{key}_document") == expected


def test_text_files_and_workers(tool, tokenizer_json, tmp_path, monkeypatch):
    """Each file is a document; several small ones go to a worker at once."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_bytes(TEXTS[number % 4].encode())
    (tmp_path / "05.jsonl").write_text(json.dumps({"text": "between"}))
    texts = [TEXTS[number % 4] for number in range(20)]
    texts.insert(5, "between")
    for workers in (1, 2):
        prefix = tmp_path / f"made by {workers}" / "out"
        code, _, err = tool(
            "preprocess_data", *arguments(tokenizer_json, prefix, tmp_path / "*.*"), "--workers", workers
        )
        assert code == 0, err
        assert files_of(f"{prefix}_text_document") == slow_reference(texts, tokenizer_json)


def test_sentences_in_one_run(tool, tokenizer_json, tmp_path):
    text = "It rains. Dr. Smith stays.\nHe reads!"
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": ""}))
    command = arguments(tokenizer_json, tmp_path / "out", tmp_path / "in.jsonl")
    for flags in ([], ["--keep-newlines"]):
        assert tool("preprocess_data", *command, "--split-sentences", "--overwrite", "--workers", 1, *flags)[0] == 0
        dataset = IndexedDataset(tmp_path / "out_text_sentence")
        assert (len(dataset), dataset.num_documents) == (3, 2)
        wanted = slow_reference([text, ""], tokenizer_json, sentences=True, keep_newlines=bool(flags))
        assert files_of(tmp_path / "out_text_sentence") == wanted
    code, _, err = tool("preprocess_data", *command, "--split-sentences", "--lang", "klingon", "--workers", 1)
    assert (code, err.count("\n")) == (2, 1)
    assert "klingon" in err


def test_sentences_are_not_surrounded_as_texts_are(tool, tokenizer_json, tmp_path):
    """A sample of BERT puts [CLS] and [SEP] around several sentences itself."""
    content = json.loads(tokenizer_json.read_text())
    first, last = sorted(content["model"]["vocab"].items(), key=lambda entry: entry[1])[5:7]
    pieces_of = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in (first, last)]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [pieces_of[0], {"Sequence": {"id": "A", "type_id": 0}}, pieces_of[1]],
        "pair": [],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in (first, last)},
    }
    around = tmp_path / "around.json"
    around.write_text(json.dumps(content))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "It rains. He reads!"}) + "\n" + json.dumps({"text": ""}))
    for tokenizer, name in ((tokenizer_json, "plain"), (around, "around")):
        command = arguments(tokenizer, tmp_path / name, tmp_path / "in.jsonl")
        for flags in ([], ["--split-sentences"]):
            assert tool("preprocess_data", *command, "--workers", 1, *flags)[0] == 0
    plain, around = (IndexedDataset(tmp_path / f"{name}_text_sentence") for name in ("plain", "around"))
    assert [around[n].tolist() for n in range(len(around))] == [plain[n].tolist() for n in range(len(plain))]
    plain, around = (IndexedDataset(tmp_path / f"{name}_text_document") for name in ("plain", "around"))
    assert around[0].tolist() == [first[1], *plain[0].tolist(), last[1]]


def test_sentencepiece_and_null(tool, sentencepiece_model, tmp_path):
    (tmp_path / "numbers.txt").write_text("5 6 7")
    command = ["--input", tmp_path / "numbers.txt", "--append-eod", "--workers", 1]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 70_001]
    assert tool("preprocess_data", *command, "--output-prefix", tmp_path / "null", *null)[0] == 0
    dataset = IndexedDataset(tmp_path / "null_text_document")
    assert dataset[0].tolist()[:3] == [5, 6, 7]
    assert dataset.dtype.name == "int32"
    model = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", sentencepiece_model]
    assert tool("preprocess_data", *command, "--output-prefix", tmp_path / "sp", *model)[0] == 0
    assert IndexedDataset(tmp_path / "sp_text_document")[0][-1] == 2


def test_shards_by_launcher(tool, mixed_input, tokenizer_json, tmp_path, monkeypatch):
    """Each shard takes its number from torchrun's variables; merged they are the unsharded output."""
    paths, records = mixed_input
    whole = arguments(tokenizer_json, tmp_path / "whole", *paths)
    assert tool("preprocess_data", *whole, "--workers", 1)[0] == 0
    command = arguments(tokenizer_json, tmp_path / "out", *paths)
    merge = ["--output-prefix", tmp_path / "out", "--merge-shards", 4]
    monkeypatch.setenv("WORLD_SIZE", "4")
    for number in (2, 0, 3):
        monkeypatch.setenv("RANK", str(number))
        assert tool("preprocess_data", *command, "--shard", "auto", "--workers", 1)[0] == 0
    code, _, err = tool("preprocess_data", *merge)
    assert (code, err.count("\n")) == (2, 1)
    assert "Shard 1/4 is missing" in err
    assert tool("preprocess_data", *command, "--shard", "1/4", "--workers", 2)[0] == 0
    assert tool("preprocess_data", *merge)[0] == 0
    expected = slow_reference([record["text"] for record in records], tokenizer_json)
    assert files_of(tmp_path / "out_text_document") == files_of(tmp_path / "whole_text_document") == expected
    merged, one = (read_record(tmp_path / f"{name}_text_document") for name in ("out", "whole"))
    for name in ("checksum", "documents", "tokens", "input_bytes", "special_tokens"):
        assert merged[name] == one[name]
    code, _, err = tool("preprocess_data", *merge)
    assert (code, "is there already" in err) == (2, True)


def test_shards_of_different_jobs_are_not_merged(tool, tokenizer_json, tmp_path):
    """Other input would leave documents out or have them twice; the paths and times of the files do not matter."""
    lines = [json.dumps({"text": f"document {number}"}) + "\n" for number in range(20)]
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for name in ("a.jsonl", "b.jsonl"):
            (tmp_path / place / name).write_text("".join(lines))
    os.utime(tmp_path / "there" / "a.jsonl", (1, 1))
    here, there = (sorted((tmp_path / place).iterdir()) for place in ("here", "there"))
    merge = ["--output-prefix", tmp_path / "out", "--merge-shards", 2]

    def run(shard, *inputs_and_flags):
        command = arguments(tokenizer_json, tmp_path / "out", *inputs_and_flags)
        assert tool("preprocess_data", *command, "--shard", shard, "--workers", 1, "--overwrite")[0] == 0

    run("0/2", *here)
    for others in ([here[0]], [*reversed(here)], [*here, "--append-eod"], [*here, "--max-document-bytes", 1000]):
        run("1/2", *others)
        code, _, err = tool("preprocess_data", *merge)
        assert (code, err.count("\n")) == (2, 1)
        assert "Shard 1/2 is of another job than shard 0/2" in err
        assert not (tmp_path / "out_text_document.bin").exists()
    run("1/2", *there)
    assert tool("preprocess_data", *merge)[0] == 0
    expected = slow_reference([json.loads(line)["text"] for line in lines * 2], tokenizer_json)
    assert files_of(tmp_path / "out_text_document") == expected


def test_which_shard():
    assert parse_shard("3/8", {}) == (3, 8)
    assert parse_shard("auto", {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert parse_shard("auto", {**array, "SLURM_ARRAY_TASK_STEP": "2"}) == (3, 4)
    assert parse_shard("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}) == (0, 3)
    for text, environment, message in [
        ("8/8", {}, "there is no shard 8/8"),
        ("1", {}, "neither i/n"),
        ("auto", {}, "neither torchrun"),
        ("auto", {"WORLD_SIZE": "2"}, "RANK is None"),
        ("auto", array, "there is no shard 6/4"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_shard(text, environment)


def test_started_again_when_done(tool, tokenizer_json, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "good"}))
    command = arguments(tokenizer_json, tmp_path / "out", source)
    assert tool("preprocess_data", *command, "--workers", 1)[0] == 0
    before = files_of(tmp_path / "out_text_document")
    code, out, _ = tool("preprocess_data", *command, "--workers", 2)
    assert code == 0
    assert "An earlier start had done the work" in out
    code, _, err = tool("preprocess_data", *command, "--append-eod")
    assert (code, err.count("\n")) == (2, 1)
    assert "--overwrite" in err
    assert files_of(tmp_path / "out_text_document") == before
    assert tool("preprocess_data", *command, "--append-eod", "--overwrite")[0] == 0
    assert files_of(tmp_path / "out_text_document") == slow_reference(["good"], tokenizer_json, append_eod=True)
    assert not list(tmp_path.glob("*.preprocessing"))


def test_find_optimal_num_workers(tool, tokenizer_json, tmp_path):
    (tmp_path / "in.jsonl").write_text((json.dumps({"text": TEXTS[0]}) + "\n") * 50)
    command = arguments(tokenizer_json, tmp_path / "out", tmp_path / "in.jsonl")
    flags = ["--find-optimal-num-workers", "--workers-to-check", 1, 2, "--max-documents", 30]
    code, out, _ = tool("preprocess_data", *command, *flags)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["1 workers", "2 workers", "Fastest"]
    assert not list(tmp_path.glob("out*"))


def test_record(tool, tokenizer_json, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "good"}) + "\n[]\n")
    command = arguments(tokenizer_json, tmp_path / "out", tmp_path / "in.jsonl")
    assert tool("preprocess_data", *command, "--append-eod", "--on-bad-document", "skip", "--workers", 1)[0] == 0
    record = read_record(tmp_path / "out_text_document")
    tokens = len(files_of(tmp_path / "out_text_document")[0]) // struct.calcsize("H")
    assert (record["documents"], record["skipped_documents"], record["tokens"]) == (1, 1, tokens)
    assert record["special_tokens"]["end of document"] == {"text": "<|endoftext|>", "id": 0}
    assert record["append_eod"] is True
