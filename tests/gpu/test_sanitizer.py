"""NVIDIA's compute-sanitizer finds nothing in our kernels, on a machine whose runtime lets it look."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    try:
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} was not through after {SECONDS} s")
    said = f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    if "not supported" in said:
        pytest.skip(f"{tool} cannot look at this device: {said.strip().splitlines()[0]}")
    assert ran.returncode == 0, said
