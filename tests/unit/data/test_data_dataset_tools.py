"""inspect_dataset, merge_datasets, split_dataset: what they print, what they write, how they end."""

import json
import subprocess
import sys

import numpy as np
import pytest
from small_data import GOLDEN_DOCUMENTS, TOOLS, load_tool, write_dataset

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.tokenizer.base import TokenizerSettings
from megallm.data.tokenizer.build import build_tokenizer
from megallm.data.tokenizer.record import describe, write_record

NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "9")


@pytest.fixture
def prefix(golden, tmp_path):
    return str(tmp_path / "golden")


def test_inspect_shows_counts_lengths_and_documents(tool, prefix):
    code, out, _ = tool("inspect_dataset", prefix, "--decode", 1, 4, "--decode-tokens", 2, *NULL)
    assert code == 0
    assert "5 documents (0 without tokens), 5 sequences, 19 tokens as uint16, 38 bytes" in out
    assert "tokens of a document: 2 to 6, mean 3.8" in out
    assert [line.split() for line in out.splitlines() if "#" in line] == [
        ["2", "to", "3", "2", "#" * 27],
        ["4", "to", "7", "3", "#" * 40],
    ]
    assert "document 1, 3 tokens, the first 2:\n    '1 2'" in out
    assert "0 of 5 documents (0.0%) end with" in out


def test_inspect_gives_json(tool, prefix):
    code, out, _ = tool("inspect_dataset", prefix, prefix, "--json", "--verify", "--decode", 0)
    assert code == 0
    results = json.loads(out)
    assert len(results) == 2
    assert results[0]["documents"] == 5
    assert results[0]["document_lengths"]["histogram"] == [
        {"from": 2, "to": 3, "count": 2},
        {"from": 4, "to": 7, "count": 3},
    ]
    assert results[0]["decoded"] == [{"document": 0, "tokens": 4, "ids": [5, 6, 7, 0], "text": None}]
    assert results[0]["verified"] is True
    assert results[0]["special_tokens"]["documents_read"] == 5


def test_inspect_counts_special_tokens_of_the_record(tool, tmp_path):
    write_dataset(tmp_path / "x", [[1, 9], [9, 2, 9], [3]])
    write_record(tmp_path / "x", describe(build_tokenizer(TokenizerSettings("NullTokenizer", vocab_size=9))))
    code, out, _ = tool("inspect_dataset", tmp_path / "x", "--verify", "--json")
    assert code == 0
    (result,) = json.loads(out)
    assert result["vocab_size"] == 10
    assert [(token["id"], token["count"]) for token in result["special_tokens"]["tokens"]] == [(9, 3)]
    assert result["special_tokens"]["documents_ended"] == 2
    assert result["special_tokens"]["first_document_not_ended"] == 2
    code, _, err = tool("inspect_dataset", tmp_path / "x", "--tokenizer-type", "NullTokenizer", "--vocab-size", 8)
    assert (code, err.count("\n")) == (2, 1)
    assert "was made with another tokenizer" in err


def test_inspect_verifies_every_token(tool, prefix):
    assert tool("inspect_dataset", prefix, "--verify", "--vocab-size", 10)[0] == 0
    code, _, err = tool("inspect_dataset", prefix, "--verify", "--vocab-size", 9)
    assert (code, err.count("\n")) == (2, 1)
    assert (
        "golden.bin: token 0 of sequence 2 in document 2 (byte 14) is 9, but ids of this vocabulary are 0 to 8" in err
    )


def test_inspect_compares(tool, prefix, tmp_path):
    write_dataset(tmp_path / "same", GOLDEN_DOCUMENTS)
    write_dataset(tmp_path / "other", [*GOLDEN_DOCUMENTS[:2], [9, 9, 8, 9, 9, 0], *GOLDEN_DOCUMENTS[3:]])
    code, out, _ = tool("inspect_dataset", prefix, "--compare", tmp_path / "same")
    assert code == 0
    assert "byte for byte" in out
    code, out, _ = tool("inspect_dataset", prefix, "--compare", tmp_path / "other")
    assert code == 1
    assert "document 2, position 2: token 9 in" in out
    code, out, _ = tool("inspect_dataset", prefix, "--compare", tmp_path / "other", "--json")
    assert code == 1
    assert json.loads(out)[0]["difference"]["document"] == 2


def test_inspect_refuses_what_is_not_there(tool, prefix, tmp_path):
    for words, message in (
        ([prefix, "--decode", "5"], "--decode 5: "),
        ([f"{prefix}.idx"], "give the path without its ending"),
        ([tmp_path], "is a folder: give the path of a dataset"),
        ([prefix, "--verifi"], "the nearest is --verify"),
    ):
        code, _, err = tool("inspect_dataset", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_split_and_merge(tool, prefix, tmp_path):
    out = tmp_path / "parts" / "x"
    code, text, _ = tool("split_dataset", "--input", prefix, "--output-prefix", out, "--documents", "1,3,rest")
    assert code == 0
    assert [line.split(": ")[1] for line in text.splitlines()] == [
        "1 documents, 4 tokens",
        "3 documents, 11 tokens",
        "1 documents, 4 tokens",
    ]
    assert IndexedDataset(f"{out}_1")[1].tolist() == GOLDEN_DOCUMENTS[2]
    code, text, _ = tool(
        "merge_datasets", "--input", tmp_path / "parts", "--output-prefix", tmp_path / "again", "--json"
    )
    assert code == 0
    assert json.loads(text)["documents"] == 5
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"again{ending}").read_bytes() == (tmp_path / f"golden{ending}").read_bytes()
    command = (
        "split_dataset",
        "--input",
        prefix,
        "--output-prefix",
        out,
        "--shares",
        "80,20",
        "--names",
        "train",
        "valid",
    )
    code, text, _ = tool(*command, "--json")
    assert [(part["output"][-7:], part["documents"]) for part in json.loads(text)] == [("x_train", 4), ("x_valid", 1)]
    tool("split_dataset", "--input", prefix, "--output-prefix", tmp_path / "half", "--parts", 2)
    assert [IndexedDataset(tmp_path / f"half_{part}").num_documents for part in (0, 1)] == [2, 3]


def test_split_and_merge_refuse(tool, prefix, tmp_path):
    write_dataset(tmp_path / "wide", [[1]], vocab_size=70000)
    split = ("split_dataset", "--input", prefix, "--output-prefix", tmp_path / "out" / "x")
    merge = ("merge_datasets", "--output-prefix", tmp_path / "out" / "x", "--input")
    before = sorted(tmp_path.iterdir())
    for words, message in (
        ([*split, "--documents", "1,2"], "Parts of 1, 2 documents are 3 in sum, each at least 1;"),
        ([*split, "--documents", "9,rest"], "Parts of 9, -4 documents"),
        ([*split, "--documents", "1,x"], "not 'x'"),
        ([*split, "--shares", "95;5"], "such as 95,5, not '95;5'"),
        ([*split, "--parts", "6"], "no whole document of 5; 6 documents"),
        ([*split, "--parts", "2", "--names", "a"], "2 parts need as many different --names"),
        ([*split], "one of the arguments --shares --documents --parts is required"),
        ([*merge, prefix, tmp_path / "wide"], "uint16 in"),
        ([*merge, tmp_path / "nothing"], "nothing.idx does not exist"),
        ([*merge, prefix, "--multimodal"], "cannot be merged"),
        ([*merge, prefix, "--output-prefix", "x/"], "'x/' has no name behind its folder"),
        ([*split, "--parts", "2", "--output-prefix", "x/"], "'x/' has no name behind its folder"),
    ):
        code, _, err = tool(*words)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["inspect_dataset", "merge_datasets", "split_dataset"])
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit):
        load_tool(name).main(["--help"])
    assert f"examples:\n  python tools/{name}.py" in capsys.readouterr().out


def test_a_dataset_without_documents(tool, tmp_path):
    write_dataset(tmp_path / "x", [])
    code, out, _ = tool("inspect_dataset", tmp_path / "x", "--verify", *NULL)
    assert code == 0
    assert "0 documents" in out
    assert np.array_equal(IndexedDataset(tmp_path / "x").document_indices, [0])


def test_a_reader_of_the_output_that_leaves_early(tmp_path):
    write_dataset(tmp_path / "x", GOLDEN_DOCUMENTS * 2000)
    command = [
        sys.executable,
        TOOLS / "inspect_dataset.py",
        tmp_path / "x",
        "--json",
        "--decode",
        *map(str, range(9000)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=TOOLS.parent) as tool:
        assert tool.stdout.readline() == b"[\n"
        tool.stdout.close()
        assert tool.stderr.read() == b""
        assert tool.wait(60) == 1
