"""The CUDA kernels on the CPU, a small part of `make emulated-test`: each once, and with each input unaligned."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated.build import ROOT, has_cuda_headers


@pytest.mark.slow
@pytest.mark.skipif(not has_cuda_headers(), reason="no headers of a CUDA toolkit")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation is written for x86-64")
def test_every_kernel_once(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.emulated.build", "--quick", str(tmp_path / "tree")], cwd=ROOT, check=True
    )
    tests = ["tests/emulated/operators.py", "-k", "test_once or unaligned or stands_for"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path / "tree",
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
