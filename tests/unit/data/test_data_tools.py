"""The tools: how they start, and the collection of text."""

import json
import subprocess
import sys

import pytest
from small_data import TOOLS, load_tool


@pytest.mark.slow
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
    for size, message in (("-1", "'-1' is not a number"), ("x", "'x' is not a number"), ("0.0001", "more than")):
        code, _, err = tool("collect_text", "--output", tmp_path / "c.jsonl", "--max-megabytes", size)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


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
    assert max(map(len, done.stdout.splitlines())) <= 100
