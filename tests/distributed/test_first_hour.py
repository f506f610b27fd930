"""The commands of docs/first-hour.md, with fewer steps and less text, answer as the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import LAUNCHER_VARIABLES, ROOT

PAGE = ROOT / "docs" / "first-hour.md"
# What the page says, and what is run instead.
SHORTER = {
    "--max-megabytes 4": "--max-megabytes 1",
    "--train-iters 120": "--train-iters 6",
    "--lr-warmup-iters 10": "--lr-warmup-iters 1",
    "--eval-interval 60": "--eval-interval 3",
    "--exit-interval 60": "--exit-interval 3",
    "--eval-iters 4": "--eval-iters 1",
    "--log-interval 20": "--log-interval 1",
    "tools/evaluate.py --load": "tools/evaluate.py --max-documents 3 --load",
}


def commands() -> list[tuple[str, list[str]]]:
    """The page's commands, each with the lines that it answers."""
    found: list[tuple[str, list[str]]] = []
    for line in PAGE.read_text().splitlines():
        if not line.startswith("    "):
            continue
        if line.startswith("    $ "):
            found.append((line.removeprefix("    $ "), []))
        elif found[-1][0].endswith("\\"):
            command, answers = found[-1]
            found[-1] = command[:-1] + line.strip(), answers
        else:
            found[-1][1].append(line)
    return found


def words(line: str) -> list[str]:
    """What a line says, without its numbers and their units."""
    return re.findall(r"(?!GiB|MiB|KiB)[A-Za-z_]{3,}", line)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_hour(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    text = PAGE.read_text()
    assert all(given in text for given in SHORTER)
    for command, answers in commands():
        short = command.replace("hour/", f"{tmp_path}/hour/").replace("mkdir -p hour", f"mkdir -p {tmp_path}/hour")
        for given, instead in SHORTER.items():
            short = short.replace(given, instead)
        done = subprocess.run(short, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        output = (done.stdout + done.stderr).replace(f"{tmp_path}/", "")
        assert done.returncode == (2 if "problems in the configuration" in "".join(answers) else 0), output
        if "tools/generate.py" in command:
            assert done.stdout.startswith("def __init__(self")
            continue
        lines = iter([words(line) for line in output.splitlines()])
        for answer in answers:
            # Consumes the lines up to the one that it finds: the answers stand in the page's order.
            assert not words(answer) or words(answer) in lines, f"{answer}\nis missing, or out of order, in\n{output}"
