"""Training steps on a GPU that is not there: nothing is left on the CPU, and nothing waits for the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from megallm.ops.library import NATIVE
from tests.unit.fake_gpu import CASES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="a function of torch's is replaced as Linux does it"),
    pytest.mark.skipif(torch.cuda._is_compiled(), reason="this torch has CUDA: tests/gpu is for it"),
    pytest.mark.skipif(not NATIVE.loaded, reason=f"native operators: {NATIVE.reason}"),
]
SOURCE = Path(__file__).parent / "fake_gpu.cpp"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    """How each case ended, by its name and rank."""
    library = tmp_path_factory.mktemp("fake_gpu") / "fake_gpu.so"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC"]
    headers = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    linked = [part for folder in cpp_extension.library_paths() for part in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    subprocess.run([*compiler, str(SOURCE), "-o", str(library), *headers, *linked, "-lc10", "-ltorch_cpu"], check=True)
    command = [sys.executable, "-m", "tests.unit.fake_gpu", str(library)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return dict(line.split("\t") for line in ended.stdout.splitlines())


def test_mistakes_are_seen(outcomes):
    assert outcomes["mixes devices"].startswith("FakeTensorDeviceMismatchError")
    assert outcomes["reads a value"].startswith("DataDependentOutputException")
    assert "waits for what it copies" in outcomes["copies to the host"]
    assert "was given tensors on ['cpu', 'cuda:0']" in outcomes["gives an operator something else"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_stays_on_the_gpu_and_waits_for_nothing(case, outcomes):
    found = {name: text for name, text in outcomes.items() if name.startswith(f"{case.name}, rank ")}
    assert found and set(found.values()) == {"ok"}, found
