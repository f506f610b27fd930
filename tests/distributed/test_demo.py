"""The demo in a shortened form: it ends well, leaves what it promises, and the second layout goes on from the first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import LAUNCHER_VARIABLES, ROOT, training_lines, validation_lines

FILES = (
    "text.jsonl",
    "tokenizer.json",
    "python_text_document.bin",
    "python_text_document.idx",
    "first_layout.jsonl",
    "second_layout.jsonl",
    "timeline.rank0.jsonl",
    "timeline.rank1.jsonl",
    "loss.png",
    "timeline.svg",
    "checkpoints/iter_0000005/manifest.json",
    "checkpoints/iter_0000010/manifest.json",
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_demo(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= {
        "DEMO_STEPS": "10",
        "DEMO_FOLDER": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "examples/demo.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    empty = [name for name in FILES if not (tmp_path / name).is_file() or not (tmp_path / name).stat().st_size]
    assert not empty, f"the demo did not write {empty}"
    assert "def __init__(self" in done.stdout.split("tools/generate.py")[-1].split("\n", 1)[1]
    first, second = (training_lines(tmp_path / f"{name}_layout.jsonl") for name in ("first", "second"))
    assert [line["iteration"] for line in first + second] == list(range(1, 11))
    assert [line["consumed_samples"] for line in first + second] == list(range(32, 352, 32))
    losses = [line["lm_loss"] for line in first + second]
    assert losses[0] == pytest.approx(9.0, abs=0.7), "about as many nats as ln 8192 at the start"
    assert losses[5] == pytest.approx(losses[4], abs=0.5), "the loss goes on where it was"
    assert losses[5] < losses[0] - 0.5
    checks = [validation_lines(tmp_path / f"{name}_layout.jsonl") for name in ("first", "second")]
    assert [[check["iteration"] for check in part] for part in checks] == [[5], [10]]
    assert checks[1][0]["valid_lm_loss"] < checks[0][0]["valid_lm_loss"]
