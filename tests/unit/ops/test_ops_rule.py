"""Every native operator against its reference, on the CPU: the rule, and what else is asked of each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.config.operators import OPERATORS
from megallm.ops.library import NATIVE
from tests.unit.ops import accuracy
from tests.unit.ops.accuracy import Case
from tests.unit.ops.cases import CASES, activation, norm

BUILT = [case for case in CASES if case.operator in NATIVE.on_cpu]
# Operators that are no functions of rows have their tests in a file of their own.
ELSEWHERE = {"initial_values"}
every_case = pytest.mark.parametrize("case", BUILT, ids=str)
needs_native = pytest.mark.skipif(not NATIVE.loaded, reason=f"native operators: {NATIVE.reason}")
pytestmark = needs_native


def test_every_operator_is_built_and_has_a_case():
    assert NATIVE.on_cpu == set(OPERATORS)
    assert NATIVE.on_cuda == (set(OPERATORS) if NATIVE.cuda_architectures else set())
    assert {case.operator for case in CASES} | ELSEWHERE == set(OPERATORS)
    assert len({case.name for case in CASES}) == len(CASES)


@every_case
def test_error_is_at_most_twice_that_of_eager(case: Case):
    accuracy.check_shapes(case, "cpu", case.quick_shapes)


@pytest.mark.slow
@every_case
def test_error_in_many_shapes(case: Case):
    accuracy.check_shapes(case, "cpu", case.shapes)


@pytest.mark.slow
@every_case
def test_any_shape(case: Case):
    @settings(max_examples=40, deadline=None)
    @given(rows=st.integers(0, 40), width=st.integers(1, 200), dtype=st.sampled_from(case.dtypes))
    def holds(rows: int, width: int, dtype: torch.dtype) -> None:
        accuracy.check_accuracy(case, (rows, width), dtype, "cpu")

    holds()


@pytest.mark.slow
@every_case
def test_views_give_the_bits_of_their_copies(case: Case):
    accuracy.check_views(case, "cpu")


@pytest.mark.slow
@every_case
def test_each_input_alone_unaligned(case: Case):
    accuracy.check_each_unaligned(case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in BUILT if not case.name.startswith(accuracy.COPIES)], ids=str)
def test_slices_are_not_copied(case: Case):
    accuracy.check_no_copies(case)


@pytest.mark.slow
@every_case
def test_deterministic_and_independent_of_the_batch(case: Case):
    accuracy.check_determinism(case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*activation.CASES, *norm.CASES], ids=str)
def test_large_results_are_those_of_their_rows(case: Case):
    accuracy.check_large(case)


@pytest.mark.slow
@every_case
def test_number_of_threads_changes_nothing(case: Case):
    accuracy.check_threads(case)


@pytest.mark.slow
@every_case
def test_not_finite_values_stay_in_their_row(case: Case):
    accuracy.check_non_finite(case, "cpu")


def test_gelu_of_every_number_of_16_bits():
    accuracy.check_gelu_of_every_number("cpu")


def test_no_gradient_where_nothing_is_seen():
    accuracy.check_unseen_keys("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["native", "reference"])
@every_case
def test_gradcheck(case: Case, implementation: str):
    accuracy.check_gradients(case, "cpu", implementation)


@pytest.mark.slow
@every_case
def test_gradient_of_one_input_alone(case: Case):
    accuracy.check_single_gradients(case)


@pytest.mark.slow
@every_case
def test_opcheck(case: Case):
    accuracy.check_registration(case, OPERATORS[case.operator])


@pytest.mark.slow
@every_case
def test_compiles_as_one_graph(case: Case):
    accuracy.check_compiles(case, "cpu")
