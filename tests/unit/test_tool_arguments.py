"""Programs answer a mistake on the command line, and Ctrl-C at any moment, with one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.train import program
from tools import convert_checkpoint, evaluate, generate, plot_metrics, schedule

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("tool", "line", "wanted"),
    [
        (generate, "--load x", "one of the arguments --prompt --prompts is required."),
        (generate, "--load x --promt y", "there is no argument --promt; the nearest is --prompt."),
        (evaluate, "--load x --text y --max-documents z", "argument --max-documents: invalid int value: 'z'."),
        (convert_checkpoint, "--form hf", "there is no argument --form; the nearest is --from."),
        (convert_checkpoint, "--from hf", "the following arguments are required: --to, --load."),
        (plot_metrics, "--out x.png", "there is no argument --out; the nearest is --output."),
    ],
)
def test_a_mistake_is_answered_with_one_sentence(
    tool, line: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.parse(line.split())
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.endswith(f": {wanted}\n")
    assert written.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("", "schedule.py: the following arguments are required: COMMAND"),
        ("draw --schedul 1f2b", "schedule.py draw: argument --schedule: invalid choice: '1f2b' (choose from 'gpipe'"),
        ("draw -p 0", "schedule.py draw: num_ranks is 0; it must be at least 1"),
    ],
)
def test_a_mistake_in_a_command_is_answered_with_one_sentence(
    line: str, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["schedule.py"])
    with pytest.raises(SystemExit, match="2"):
        sys.exit(schedule.main(line.split()))
    written = capsys.readouterr().err
    assert written.startswith(wanted)
    assert written.count("\n") == 1


@pytest.mark.parametrize("flag", ["--help", "--print-config", "--dry-run"])
def test_who_has_read_enough_sees_no_traceback(flag: str) -> None:
    flags = "--mock-data --tokenizer-type NullTokenizer --vocab-size 8 --num-layers 1 --hidden-size 8 --lr 1"
    flags += " --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --train-iters 1"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *flags.split(), flag],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_prompt_may_begin_with_dashes() -> None:
    assert generate.parse(["--load", "x", "--prompt", "-- a comment of SQL"]).prompt == "-- a comment of SQL"


def test_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing cannot be read: No such file or directory; give a file that"):
        plot_metrics.read(str(tmp_path / "nothing"))
    (tmp_path / "numbers").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="numbers cannot be read: it is no text"):
        plot_metrics.read(str(tmp_path / "numbers"))


@pytest.mark.parametrize("interrupted", ["parse_arguments", "validate", "_train"])
def test_ctrl_c_at_any_moment_is_no_traceback(
    interrupted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, interrupted, press)
    monkeypatch.setattr("os._exit", sys.exit)
    train = program.Program("pretrain_gpt.py", "", "gpt", lambda config: 0)
    flags = "--mock-data --tokenizer-type NullTokenizer --vocab-size 8 --num-layers 1 --hidden-size 8 --lr 1"
    flags += " --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --train-iters 1"
    with pytest.raises(SystemExit, match="130"):
        program.main(train, flags.split())
    assert capsys.readouterr().err == "pretrain_gpt.py: interrupted; --load continues from the last checkpoint\n"


@pytest.mark.parametrize(
    ("tool", "line", "wanted"),
    [
        (evaluate, "--load x --text y", "interrupted"),
        (generate, "--load x --prompt y", "interrupted"),
        (
            convert_checkpoint,
            "--from hf --to megallm --load x --save y",
            "interrupted; nothing half written is left",
        ),
    ],
)
def test_ctrl_c_of_a_tool(
    tool, line: str, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "run", press)
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("sys.argv", [tool.PROGRAM, *line.split()])
    with pytest.raises(SystemExit, match="130"):
        tool.main()
    assert capsys.readouterr().err == f"{tool.PROGRAM}: {wanted}\n"
