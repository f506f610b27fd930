"""Every CUDA kernel, emulated on the CPU, by the checks of the operators that a GPU passes.

Run by `make emulated-test`, and a part of it by `test_emulated.py`, in the copy of the project that `build.py` makes.
Its name keeps it out of `make test` in the project itself.
"""

import pytest

from megallm.config.operators import OPERATORS
from megallm.ops.library import NATIVE
from tests.unit.ops import accuracy
from tests.unit.ops.accuracy import Case
from tests.unit.ops.cases import CASES

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_kernel_stands_for_the_operator_of_the_cpu():
    assert NATIVE.cuda_architectures == ("emulated",), "these tests are for `make emulated-test` and `tests/emulated`"
    assert NATIVE.on_cpu == set(OPERATORS)


@every_case
def test_error_is_at_most_twice_that_of_eager(case: Case):
    accuracy.check_shapes(case, "cpu", case.shapes)


@pytest.mark.parametrize(
    "check",
    [
        accuracy.check_views_of_kernels,
        accuracy.check_each_unaligned,
        accuracy.check_determinism,
        accuracy.check_non_finite,
    ],
)
@every_case
def test_as_on_a_gpu(case: Case, check):
    check(case, "cpu")


@every_case
def test_gradcheck(case: Case):
    accuracy.check_gradients(case, "cpu", "native")


def test_a_row_of_a_table_that_nearly_all_tokens_use():
    accuracy.check_a_much_used_row("cpu")


def test_gelu_of_every_number_of_16_bits():
    accuracy.check_gelu_of_every_number("cpu")


def test_no_gradient_where_nothing_is_seen():
    accuracy.check_unseen_keys("cpu")


@every_case
def test_once(case: Case):
    """Each kernel in every dtype: single elements, vectors for a warp, vectors for a block."""
    accuracy.check_shapes(case, "cpu", ((5, 33), (9, 64), (3, 1032)))
