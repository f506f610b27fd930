"""LayerNorm and RMSNorm on the CPU: what the rule does not ask. And that a missing library is missed once."""

import os
import subprocess
import sys

import pytest
import torch

from megallm.ops.library import NATIVE
from megallm.ops.norm import layer_norm, norm_of_sum, rms_norm
from tests.unit.ops import accuracy
from tests.unit.ops.cases.norm import CASES

needs_native = pytest.mark.skipif(not NATIVE.in_use, reason=f"native operators: {NATIVE.reason}")


@needs_native
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_many_rows_sum_as_well_as_eager(case):
    accuracy.check_accuracy(case, (20011, 24), torch.float32, "cpu")


@needs_native
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_the_norm_of_a_sum_has_the_bits_of_an_addition_before_it(kind, dtype):
    x, residual = (torch.randn(7, 130).to(dtype) for _ in range(2))
    weight, bias = torch.rand(130).to(dtype), torch.randn(130).to(dtype)
    bias = bias if kind == "LayerNorm" else None
    y, total = norm_of_sum(x, residual, weight, bias, 1e-5, kind, "native")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm_of_sum(total, None, weight, bias, 1e-5, kind, "native")[0])


@needs_native
def test_a_sum_whose_norm_is_not_used_has_its_gradient():
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    grad = torch.randn(3, 8)
    norm_of_sum(x, residual, torch.ones(8), None, 1e-5, "RMSNorm", "native")[1].backward(grad)
    assert torch.equal(x.grad, grad)
    assert torch.equal(residual.grad, grad)


@needs_native
def test_a_large_mean_does_not_spoil_the_variance():
    x = torch.randn(4, 1000, dtype=torch.float64) + 1000
    exact = layer_norm(x, torch.ones(1000).double(), None, 1e-5, "reference")
    found = layer_norm(x.float(), torch.ones(1000), None, 1e-5, "native")
    assert (
        found - layer_norm(x.float().double(), torch.ones(1000).double(), None, 1e-5, "reference")
    ).abs().max() < 1e-3
    assert (found - exact).abs().max() < 1e-3


@needs_native
def test_packed_input_is_not_copied():
    packed = torch.randn(64, 3 * 1024)
    weight = torch.ones(1024)
    with torch.profiler.profile() as profile:
        torch.ops.megallm.norm_forward(packed[:, 1024:2048], None, weight, None, 1e-5, False)
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
        torch.ops.megallm.norm_backward(torch.ones(2, 4), x, weight, torch.ones(0), torch.ones(2), None, False)


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


@pytest.mark.slow
def test_reference_by_choice_is_silent():
    result = run_python(USE, MEGALLM_OPS="reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False")
    assert "Native operators" not in result.stderr


@pytest.mark.slow
def test_without_the_extension_everything_works_and_says_so_once():
    result = run_python(HIDE_EXTENSION + USE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False")
    assert result.stderr.count("Native operators are not in use") == 1
    assert "Native operators" not in run_python(HIDE_EXTENSION + USE, LOCAL_RANK="3").stderr


@pytest.mark.slow
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
    for norm in (rms_norm, lambda x, weight, *rest: layer_norm(x, weight, None, *rest)):
        found = norm(x, weight, 1e-5, "torch")
        assert found.dtype == dtype
        torch.testing.assert_close(found, norm(x, weight, 1e-5, "reference"))


def test_a_residual_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="residual must be like the input"):
        norm_of_sum(torch.ones(2, 3), torch.ones(2, 3).double(), torch.ones(3), None, 1e-5, "RMSNorm")
