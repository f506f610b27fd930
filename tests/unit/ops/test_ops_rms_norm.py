"""RMSNorm on the CPU: what the rule does not ask. And that a missing library is missed once."""

import os
import subprocess
import sys

import pytest
import torch

from megallm.ops.library import NATIVE
from megallm.ops.rms_norm import rms_norm
from tests.unit.ops import accuracy
from tests.unit.ops.cases.rms_norm import CASES, check_raw_operators

CASE = CASES[0]
needs_native = pytest.mark.skipif(not NATIVE.in_use, reason=f"native operators: {NATIVE.reason}")


@needs_native
def test_many_rows_sum_as_well_as_eager():
    accuracy.check_accuracy(CASE, (20011, 24), torch.float32, "cpu")


@needs_native
def test_raw_operators_without_weight_with_offset_and_residual():
    check_raw_operators("cpu")


@needs_native
def test_packed_input_is_not_copied():
    packed = torch.randn(64, 3 * 1024)
    weight = torch.ones(1024)
    with torch.profiler.profile() as profile:
        torch.ops.megallm.rms_norm_forward(packed[:, 1024:2048], weight, 1e-5, 0.0)
    assert "aten::copy_" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.ones(2, 3), torch.ones(4), "as long as the last dimension"),
        (torch.tensor(1.0), torch.ones(1), "as long as the last dimension"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(3), "not on torch.int64"),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.bfloat16), "or be float32"),
    ],
)
def test_refuses_what_does_not_fit(x, weight, words):
    with pytest.raises(ValueError, match=words):
        rms_norm(x, weight, 1e-5)


@needs_native
def test_raw_operator_refuses_a_wrong_gradient():
    x, weight = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(RuntimeError):
        torch.ops.megallm.rms_norm_backward(torch.ones(2, 4), x, weight, torch.ones(2), None, 0.0)


HIDE_EXTENSION = "import sys; sys.modules['megallm._C'] = None\n"
USE = """
import torch
from megallm.ops import rms_norm
from megallm.ops.library import NATIVE
x = torch.randn(4, 8, requires_grad=True)
weight = torch.ones(8, requires_grad=True)
rms_norm(x, weight, 1e-5).sum().backward()
assert x.grad is not None and weight.grad is not None
print(NATIVE.in_use, NATIVE.reason)
"""


def run_python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    base = {name: value for name, value in os.environ.items() if name not in ("MEGALLM_OPS", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**base, **environment}, capture_output=True, text=True, timeout=300
    )


def test_reference_by_choice_is_silent():
    result = run_python(USE, MEGALLM_OPS="reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False")
    assert "Native operators" not in result.stderr


def test_without_the_extension_everything_works_and_says_so_once():
    result = run_python(HIDE_EXTENSION + USE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False")
    assert result.stderr.count("Native operators are not in use") == 1
    assert "Native operators" not in run_python(HIDE_EXTENSION + USE, LOCAL_RANK="3").stderr


def test_native_by_choice_fails_without_the_extension():
    result = run_python(HIDE_EXTENSION + USE, MEGALLM_OPS="native")
    assert result.returncode != 0
    assert "Build it with: pip install ." in result.stderr


def test_importing_the_package_alone_does_not_import_torch():
    result = run_python("import sys, megallm; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_s_own_is_a_choice(dtype):
    x, weight = torch.randn(4, 8).to(dtype), torch.rand(8)
    found = rms_norm(x, weight, 1e-5, "torch")
    assert found.dtype == dtype
    torch.testing.assert_close(found, rms_norm(x, weight, 1e-5, "reference"))
