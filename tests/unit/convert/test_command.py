"""Mistakes on the converter's command line, each in a sentence before anything is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.convert import folders
from tools import convert_checkpoint

MISTAKES = [
    ("hf", "hf", ["--target-tensor-parallel-size", "2"], r"only for --to megatron and --to megallm; leave it out"),
    ("hf", "megallm", ["--target-tensor-parallel-size", "3"], r"4 heads cannot be cut over 3 tensor ranks"),
    ("hf", "megatron", ["--target-pipeline-parallel-size", "0"], r"size 0 is not positive; give at least 1"),
    ("hf", "hf", ["--max-shard-size", "0"], r"--max-shard-size 0 is not positive; give a size in GB"),
    ("hf", "megallm", ["--max-shard-size", "1"], r"--max-shard-size has a meaning only .*: --to hf; leave it out"),
    ("hf", "megallm", ["--weights-only"], r"--weights-only has a meaning only from megallm to megallm"),
    ("hf", "megallm", ["--ckpt-step", "0"], r"--ckpt-step has a meaning only where a folder holds several"),
    ("hf", "megallm", ["--verify-text", "FILE"], r"--verify-text has a meaning only for --verify"),
    ("hf", "megallm", ["--verify", "--verify-text", "FILE"], r"--verify-text FILE is not a file"),
    ("megatron", "megallm", [], r"theirs holds a model in the format of --from hf, not of --from megatron"),
]


@pytest.mark.parametrize(("source", "target", "flags", "message"), MISTAKES, ids=[m for *_, m in MISTAKES])
def test_a_mistake_is_told_before_anything_is_written(
    tmp_path: Path, source: str, target: str, flags: list[str], message: str
) -> None:
    folders.write(tmp_path / "theirs", folders.LLAMA_CONFIG, folders.make_tensors(folders.llama_shapes()))
    places = ["--load", str(tmp_path / "theirs"), "--save", str(tmp_path / "new")]
    arguments = convert_checkpoint.parse(["--from", source, "--to", target, *places, *flags])
    with pytest.raises(ValueError, match=message):
        convert_checkpoint.run(arguments)
    assert not (tmp_path / "new").exists()


def test_flags_that_only_write_are_refused_when_models_are_compared(tmp_path: Path) -> None:
    places = ["--load", str(tmp_path), "--compare", str(tmp_path)]
    for flag in (["--overwrite"], ["--verify"], ["--dtype", "float32"]):
        with pytest.raises(ValueError, match=f"{flag[0]} has a meaning only for --save"):
            convert_checkpoint.run(convert_checkpoint.parse(["--from", "hf", "--to", "hf", *places, *flag]))
