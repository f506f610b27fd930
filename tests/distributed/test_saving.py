"""When a run saves, how it says so, and with which code it ends: programs started as a person starts them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megallm import failpoint
from megallm.checkpoint.load import find_checkpoints, verify
from megallm.file_lock import LOCK, own_folder
from megallm.train.stopping import SAVE_NOW, ExitCode
from tests.distributed.launch import (
    LAUNCHER_VARIABLES,
    ROOT,
    TINY,
    TORCHRUN,
    program_here,
    python,
    succeeded,
    training_lines,
    without,
)

LONG = [*without(TINY, "--train-iters", "--eval-interval", "--log-interval"), "--train-iters", "100000"]
LONG += ["--log-interval", "1000"]


def saved_iterations(root: Path) -> list[int]:
    """Those of the committed checkpoints, all of which are whole."""
    folders = find_checkpoints(str(root))
    for folder in folders:
        list(verify(folder))
    return sorted(int(folder.name.removeprefix("iter_")) for folder in folders)


@contextmanager
def running(command: list[str], root: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run that saves into `root`, once its first steps are done."""
    metrics = root.parent / "metrics.jsonl"
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    process = subprocess.Popen(
        [*command, "pretrain_gpt.py", *LONG, "--save", str(root), "--metrics-jsonl", str(metrics)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: metrics.exists() and len(training_lines(metrics)) > 2)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition: object, seconds: float = 150.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


@pytest.mark.slow
def test_signals_and_the_file_save(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with running([sys.executable], root) as process:
        second = python("pretrain_gpt.py", *LONG, "--save", str(root))
        assert second.code == ExitCode.MISTAKE
        assert f"is in use by another job, process {process.pid} on {socket.gethostname()}" in second.errors
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: len(find_checkpoints(str(root))) == 1)
        (root / SAVE_NOW).touch()
        wait_until(lambda: len(find_checkpoints(str(root))) == 2)
        assert process.poll() is None, "both only save"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.UNFINISHED, output
    left = re.search(r"left after iteration (\d+): SIGTERM was received", output)
    assert (
        left
        and saved_iterations(root)[-1] == int(left[1]) == training_lines(tmp_path / "metrics.jsonl")[-1]["iteration"]
    )
    # The second one may have been under way still, and is the last one then.
    assert len(saved_iterations(root)) in (2, 3)
    assert not (root / SAVE_NOW).exists() and not (root / LOCK).exists()


@pytest.mark.slow
def test_a_launcher_that_is_terminated_leaves_a_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with running([*TORCHRUN, "--standalone", "--nproc-per-node", "2"], root) as process:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert output.count("SIGTERM was received") == 1, output
    assert saved_iterations(root) == [training_lines(tmp_path / "metrics.jsonl")[-1]["iteration"]]


@pytest.mark.slow
def test_a_time_limit_leaves_with_a_checkpoint_and_in_time(tmp_path: Path) -> None:
    limit = ["--exit-duration-in-mins", "0.1", "--save", str(tmp_path)]
    ended = python("pretrain_gpt.py", *LONG, *limit)
    assert ended.code == ExitCode.UNFINISHED, ended.output + ended.errors
    assert "--exit-duration-in-mins 0.1 leaves no time to go on" in ended.output
    assert len(saved_iterations(tmp_path)) == 1


def test_in_the_background_a_save_is_told_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first of the saves fails: the run goes on, and the others come.
    failpoint._armed.cache_clear()
    monkeypatch.setenv(failpoint.VARIABLE, "checkpoint.manifest.fsync.before#1=ENOSPC")
    flags = ["--save", str(tmp_path), "--save-interval", "2", "--async-save"]
    ended = succeeded(program_here(capsys, *TINY, *flags))
    begun = [int(number) for number in re.findall(r"saving iteration (\d+) in the background", ended.output)]
    written = [int(number) for number in re.findall(r"saved \S+iter_0*(\d+) \(.* on the disk after", ended.output)]
    assert (begun, written) == ([2, 4, 6], [4, 6])
    assert "iter_0000002 cannot be saved: " in ended.output
    assert (
        "No space left on device" in ended.output and "training goes on, and the next save tries again" in ended.output
    )
    assert saved_iterations(tmp_path) == [4, 6]


@pytest.mark.parametrize("how", [[], ["--async-save"]], ids=["at once", "in the background"])
def test_a_last_save_that_fails_has_a_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    failpoint._armed.cache_clear()
    monkeypatch.setenv(failpoint.VARIABLE, "checkpoint.shard.write.before=ENOSPC")
    ended = program_here(capsys, *TINY, "--save", str(tmp_path), *how)
    assert ended.code == ExitCode.NOT_SAVED
    assert "Traceback" not in ended.errors and "iter_0000006 cannot be saved" in ended.errors
    assert "No space left on device" in ended.errors
    assert list(tmp_path.iterdir()) == []


def test_old_checkpoints_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--save", str(tmp_path), "--save-interval", "1", "--save-retain-interval", "3", "--async-save"]
    succeeded(program_here(capsys, *TINY, *flags))
    assert saved_iterations(tmp_path) == [3, 5, 6]
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_{number:07d}" for number in (3, 5, 6)]


def test_a_second_job_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with own_folder(tmp_path, lambda message: None):
        ended = program_here(capsys, *TINY, "--save", str(tmp_path))
    assert ended.code == ExitCode.MISTAKE
    assert f"{tmp_path} is in use by another job, process {os.getpid()} on" in ended.errors
    assert "iteration" not in ended.output
