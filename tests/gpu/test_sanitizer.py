"""NVIDIA's compute-sanitizer finds nothing in our kernels, on a machine whose runtime lets it look."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.ops.library import NATIVE

ROOT = Path(__file__).resolve().parents[2]
# It is not always on the path.
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
# Several of them are to fit into the minutes of a run.
SECONDS = 60
FOUND = 17

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not NATIVE.cuda_architectures, reason="built without CUDA operators"),
    pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_finds_nothing(tool: str) -> None:
    assert SANITIZER is not None
    command = [SANITIZER, "--tool", tool, "--kernel-name", "kernel_substring=megallm"]
    command += ["--error-exitcode", str(FOUND), sys.executable, "-m", "tests.gpu.every_kernel"]
    # A block of memory for each tensor: an access beyond a tensor would else be one to its neighbour.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, said = run_or_kill(command, environment, SECONDS)
    if code is None:
        pytest.skip(f"{tool} was not through after {SECONDS} s")
    # What it finds may have these words in it as well.
    if code not in (0, FOUND) and "not supported" in said:
        pytest.skip(f"{tool} cannot look at this device: {said.strip().splitlines()[0]}")
    assert code == 0, said


def run_or_kill(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """The exit code, or None where the time was over, and the end of what was said.

    A session of its own: the sanitizer's child is killed with it, and does not keep the GPU from the other tests.
    """
    settings: dict[str, Any] = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said[-8000:]
