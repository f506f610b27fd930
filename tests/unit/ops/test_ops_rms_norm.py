"""RMSNorm, native and reference, on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.ops.library import NATIVE
from megallm.ops.rms_norm import rms_norm, rms_norm_reference
from tests.unit.ops import accuracy

needs_native = pytest.mark.skipif(not NATIVE.in_use, reason=f"native operators: {NATIVE.reason}")


@needs_native
def test_error_is_at_most_twice_that_of_eager():
    accuracy.check_shapes("cpu")


@needs_native
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 40), width=st.integers(1, 200), dtype=st.sampled_from(accuracy.DTYPES))
def test_any_shape(rows, width, dtype):
    x, weight, grad_output = accuracy.random_inputs((rows, width), dtype, "cpu")
    accuracy.check_accuracy(x, weight.to(dtype), grad_output)


@needs_native
def test_many_rows_sum_as_well_as_eager():
    x, weight, grad_output = (value.float() for value in accuracy.random_inputs((20011, 24), torch.float32, "cpu"))
    found = accuracy.gradients(rms_norm, x, weight, grad_output)[2]
    eager = accuracy.gradients(rms_norm_reference, x, weight, grad_output)[2]
    exact = accuracy.gradients(rms_norm_reference, x.double(), weight.double(), grad_output.double())[2]
    accuracy.assert_not_worse("grad_weight", found, eager, exact)


@needs_native
def test_views_give_the_bits_of_their_copies():
    accuracy.check_views("cpu")


@needs_native
def test_deterministic_and_independent_of_the_batch():
    accuracy.check_determinism("cpu")


@needs_native
def test_number_of_threads_changes_nothing():
    x, weight, grad_output = accuracy.random_inputs((700, 256), torch.float32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(accuracy.gradients(rms_norm, x, weight.float(), grad_output))
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@needs_native
def test_not_finite_values_stay_in_their_row():
    accuracy.check_non_finite("cpu")


@needs_native
def test_raw_operators_without_weight_with_offset_and_residual():
    accuracy.check_raw_operators("cpu")


@needs_native
def test_packed_input_is_not_copied():
    packed = torch.randn(64, 3 * 1024)
    weight = torch.ones(1024)
    with torch.profiler.profile() as profile:
        torch.ops.megallm.rms_norm_forward(packed[:, 1024:2048], weight, 1e-5, 0.0)
    assert "aten::copy_" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("function", [rms_norm, rms_norm_reference])
def test_gradcheck(function):
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: function(a, b, 1e-5), (x, weight))


@needs_native
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
def test_opcheck(dtype):
    x, weight, grad_output = accuracy.random_inputs((3, 4, 10), dtype, "cpu")
    reciprocal = torch.ops.megallm.rms_norm_forward(x, weight.float(), 1e-5, 0.0)[1]
    torch.library.opcheck(torch.ops.megallm.rms_norm_forward.default, (x, weight.float(), 1e-5, 0.0))
    torch.library.opcheck(torch.ops.megallm.rms_norm_forward.default, (x, None, 1e-5, 0.0))
    arguments = (grad_output, x, weight.to(dtype), reciprocal, grad_output, 0.0)
    torch.library.opcheck(torch.ops.megallm.rms_norm_backward.default, arguments)


@pytest.mark.parametrize("function", [rms_norm, rms_norm_reference])
def test_compiles_as_one_graph(function):
    x, weight, grad_output = accuracy.random_inputs((6, 48), torch.float32, "cpu")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = accuracy.gradients(function, x, weight.float(), grad_output)
    for left, right in zip(accuracy.gradients(compiled, x, weight.float(), grad_output), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradient_of_one_input_alone(wanted):
    x, weight = torch.randn(4, 6, requires_grad=wanted[0]), torch.randn(6, requires_grad=wanted[1])
    rms_norm(x, weight, 1e-5).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wanted


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
