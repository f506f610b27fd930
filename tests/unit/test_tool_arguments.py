"""Tools that read what a run has left answer a mistake on the command line with one sentence."""

from pathlib import Path

import pytest

from tools import evaluate, generate, plot_metrics


@pytest.mark.parametrize(
    ("tool", "line", "wanted"),
    [
        (generate, "--load x", "one of the arguments --prompt --prompts is required."),
        (generate, "--load x --promt y", "there is no argument --promt; the nearest is --prompt."),
        (evaluate, "--load x --text y --max-documents z", "argument --max-documents: invalid int value: 'z'."),
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


def test_a_prompt_may_begin_with_dashes() -> None:
    assert generate.parse(["--load", "x", "--prompt", "-- a comment of SQL"]).prompt == "-- a comment of SQL"


def test_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing cannot be read: No such file or directory; give a file that"):
        plot_metrics.read(str(tmp_path / "nothing"))
    (tmp_path / "numbers").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="numbers cannot be read: it is no text"):
        plot_metrics.read(str(tmp_path / "numbers"))
