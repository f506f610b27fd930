"""The tools: bytes equal to a slow reference whatever the workers, and every mistake one sentence and exit code 2."""

import json
import struct
import subprocess
import sys

import pytest
from small_data import TEXTS, TOOLS, load_tool
from tokenizers import Tokenizer

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.writer import IndexedDatasetWriter
from megallm.data.prepare import job
from megallm.data.text import documents


@pytest.fixture
def jsonl(tmp_path):
    """300 documents, one of them empty, one a list of texts, and some blank lines."""
    records = [{"text": TEXTS[number % 4] * (number % 3 + 1), "title": f"number {number}"} for number in range(300)]
    records[7]["text"] = ""
    records[8]["text"] = ["one", "", "two"]
    path = tmp_path / "input.jsonl"
    path.write_text("\n \n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def arguments(tokenizer_json, prefix, *inputs):
    return [
        *("--input", *inputs, "--output-prefix", prefix),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_json),
    ]


def slow_reference(texts, tokenizer_json, append_eod):
    """Both files, for a list of texts for each document, straight from the description of the format."""
    library = Tokenizer.from_file(str(tokenizer_json))
    flat, lengths, ends = [], [], [0]
    for parts in texts:
        ids = [library.encode(part).ids for part in parts]
        ids = [part for part in ids if part]
        if ids and append_eod:
            ids[-1].append(library.token_to_id("<|endoftext|>"))
        flat += [token for part in ids for token in part]
        lengths += map(len, ids)
        ends.append(len(lengths))
    offsets = [2 * sum(lengths[:number]) for number in range(len(lengths))]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(ends))
    index = struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(ends)}q", *lengths, *offsets, *ends)
    return struct.pack(f"<{len(flat)}H", *flat), header + index


@pytest.mark.parametrize("append_eod", [True, False])
def test_bytes_equal_the_slow_reference_for_any_number_of_workers(
    tool, jsonl, tokenizer_json, tmp_path, append_eod, monkeypatch
):
    monkeypatch.setattr(job, "BATCH_DOCUMENTS", 16)
    records = [json.loads(line) for line in jsonl.read_text().split("\n") if line.strip()]
    flags = ["--append-eod"] if append_eod else []
    for workers in (1, 3) if append_eod else (1,):
        prefix = tmp_path / f"out{workers}"
        command = arguments(tokenizer_json, prefix, jsonl)
        code, out, _ = tool(
            "preprocess_data", *command, "--json-keys", "text", "title", *flags, "--workers", workers, "--partitions", 2
        )
        assert code == 0
        assert "300 documents" in out
        for key in ("text", "title"):
            texts = [record[key] if isinstance(record[key], list) else [record[key]] for record in records]
            tokens, index = slow_reference(texts, tokenizer_json, append_eod)
            assert (tmp_path / f"out{workers}_{key}_document.bin").read_bytes() == tokens
            assert (tmp_path / f"out{workers}_{key}_document.idx").read_bytes() == index


def test_text_files_are_one_document_each(tool, tokenizer_json, tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    files = [tmp_path / f"{number}.txt" for number in (2, 0, 1)]
    code, _, _ = tool("preprocess_data", *arguments(tokenizer_json, tmp_path / "out", *files), "--workers", 1)
    assert code == 0
    tokens, index = slow_reference([[TEXTS[number]] for number in (2, 0, 1)], tokenizer_json, False)
    assert (tmp_path / "out_text_document.bin").read_bytes() == tokens
    assert (tmp_path / "out_text_document.idx").read_bytes() == index


def test_sentencepiece_and_null(tool, sentencepiece_model, tmp_path):
    (tmp_path / "numbers.txt").write_text("5 6 7")
    command = ["--input", tmp_path / "numbers.txt", "--append-eod", "--workers", 1]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 70_000]
    assert tool("preprocess_data", *command, "--output-prefix", tmp_path / "null", *null)[0] == 0
    dataset = IndexedDataset(tmp_path / "null_text_document")
    assert dataset[0].tolist() == [5, 6, 7, 70_000]
    assert dataset.dtype.name == "int32"
    pieces = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", sentencepiece_model]
    assert tool("preprocess_data", *command, "--output-prefix", tmp_path / "sp", *pieces)[0] == 0
    assert IndexedDataset(tmp_path / "sp_text_document")[0][-1] == 2


GOOD = b'{"text": "good"}\n'
BROKEN_LINES = {
    b"{": "no JSON",
    b"[1]": "a JSON list stands where an object must",
    b'{"body": "x"}': "there is no key 'text'; its keys are 'body'",
    b'{"text": 3}': "under 'text' stands a JSON number",
    b'{"text": ["x", null]}': "under 'text' stands a JSON null",
    b'{"text": "\xff"}': r"byte 11 (0xff) is no UTF-8",
    b'{"text": "\\ud800"}': "half a character, \\ud800",
    b"[" * 100_000: "line 43",
}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=range(len(BROKEN_LINES)))
def test_a_broken_line_is_named_and_nothing_is_written(tool, tokenizer_json, tmp_path, line):
    (tmp_path / "in.jsonl").write_bytes(GOOD * 42 + line + b"\n" + GOOD)
    command = arguments(tokenizer_json, tmp_path / "out" / "x", tmp_path / "in.jsonl")
    code, _, err = tool("preprocess_data", *command, "--workers", 1)
    assert code == 2
    assert f"{tmp_path}/in.jsonl, line 43: " in err
    assert BROKEN_LINES[line] in err
    assert err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_broken_line_in_a_worker(tool, tokenizer_json, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "BATCH_DOCUMENTS", 2)
    (tmp_path / "in.jsonl").write_bytes(GOOD * 42 + b"{\n" + GOOD * 20 + b"{\n")
    command = arguments(tokenizer_json, tmp_path / "out" / "x", tmp_path / "in.jsonl")
    code, _, err = tool("preprocess_data", *command, "--workers", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "in.jsonl, line 43: no JSON" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing(tool, tokenizer_json, tmp_path, monkeypatch):
    """Neither of the two datasets, although there is room for one."""
    write_index = IndexedDatasetWriter._write_index

    def full(writer, file):
        if "text" in file.name:
            raise OSError(28, "No space left on device")
        write_index(writer, file)

    (tmp_path / "in.jsonl").write_text('{"text": "good", "title": "x"}')
    monkeypatch.setattr(IndexedDatasetWriter, "_write_index", full)
    command = arguments(tokenizer_json, tmp_path / "out" / "x", tmp_path / "in.jsonl")
    code, _, err = tool("preprocess_data", *command, "--workers", 1, "--json-keys", "text", "title")
    assert code == 2
    assert "x_text_document.bin cannot be written: No space left on device" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_mistakes_on_the_command_line(tool, tokenizer_json, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "in.csv").write_text("x")
    command = arguments(tokenizer_json, tmp_path / "out", tmp_path / "empty.jsonl")
    cases = [
        ([*command, "--append-eos"], "there is no argument --append-eos; the nearest is --append-eod"),
        (["--inptu", "x"], "there is no argument --inptu; the nearest is --input"),
        (command[2:], "the following arguments are required: --input"),
        (command, "There is no document in"),
        ([*command, "--workers", "0"], "'0' is not a whole number above 0"),
        ([*command, "--json-keys", "a", "a"], "names a key twice"),
        (arguments(tokenizer_json, tmp_path / "out", tmp_path / "no.jsonl"), "no.jsonl is not there"),
        (arguments(tokenizer_json, tmp_path / "out", tmp_path / "in.csv"), "unknown kind; read are .jsonl"),
        (arguments(tokenizer_json, tmp_path / "out", tmp_path / "o*"), "No file matches"),
        (arguments(tmp_path / "no.json", tmp_path / "out", tmp_path / "empty.jsonl"), "There is no tokenizer file"),
        (arguments(tokenizer_json, tmp_path / "in.csv" / "x", tmp_path / "empty.jsonl"), "cannot be written"),
    ]
    for words, message in cases:
        code, _, err = tool("preprocess_data", *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "in.csv"]


def test_collect_text(tool, tmp_path):
    command = ["--max-megabytes", "0.3"]
    assert tool("collect_text", "--output", tmp_path / "a.jsonl", *command)[0] == 0
    assert tool("collect_text", "--output", tmp_path / "b.jsonl", *command)[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    sizes = [len(record["text"].encode()) for record in records]
    assert 200_000 < sum(sizes) <= 300_000
    assert max(sizes) <= 50_000
    assert not [record for record in records if "test/" in record["source"] or "site-packages" in record["source"]]
    code, _, err = tool("collect_text", "--output", tmp_path / "c.jsonl", "--max-megabytes", "-1")
    assert (code, err.count("\n")) == (2, 1)


def test_collect_text_cuts_at_lines():
    text = "".join(f"line {number}\n" for number in range(100)) + "x" * 50 + "\nend"
    parts = list(load_tool("collect_text").cut(text, 40))
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts[:-1])
    assert sorted(len(part) for part in parts)[-2:] == [40, 51]


@pytest.mark.parametrize("name", ["preprocess_data", "train_tokenizer", "collect_text"])
def test_help_and_start(name):
    """Run as a user does: --help names an example, and no tool starts torch."""
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as error:\n    assert error.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TOOLS / f"{name}.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "example:" in done.stdout


def test_documents_are_read_one_at_a_time(jsonl):
    """A generator: the file is not read before it is asked for."""
    first = next(documents.read_documents([jsonl]))
    assert (first.line, first.place) == (1, f"{jsonl}, line 1")
