"""Every case of the parity matrix computes what one process computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.parity import Case, References, compare, run_case
from tests.distributed.parity_cases import CASES
from tests.distributed.pool import WorkerPool

# The fast tier: each axis, and most features, in the cheapest case that has it.
FAST = (
    "llama, micro-batch 1",
    "gpt, both dropouts, micro-batch 4",
    "gpt, selective recompute",
    "llama, full recompute, ragged mask",
    "llama, tensor",
    "gpt tied, tensor, vocabulary 51, no sequence parallelism",
    "llama, 1f1b",
    "gpt tied, interleaved",
    "gpt, data, sharded, overlapped, delayed",
    "gpt, data, ragged mask, clipped",
)

# After 20 steps of AdamW at a learning rate of 1e-3. A weight whose true gradient is zero moves by rounding errors over
# AdamW's epsilon of 1e-8.
WEIGHT_BOUND = 1e-10


def test_the_readme_counts_the_cases() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (number,) = re.findall(r"trains (\d+) combinations of layout", readme)
    assert int(number) == len(CASES)


_names = {case.name for case in CASES}
assert len(_names) == len(CASES), "two cases have one name"
assert _names >= set(FAST), f"the fast tier names cases that are not there: {set(FAST) - _names}"


@pytest.fixture(scope="session")
def references(pool: WorkerPool) -> References:
    return References(pool)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow) for case in CASES],
)
def test_layout_computes_what_one_process_computes(pool: WorkerPool, references: References, case: Case) -> None:
    reference = references.of(case)
    difference = compare(reference, pool.run(case.world_size, run_case, case))
    assert difference.passes, f"{case.name}, where 1 is the bound: {difference}"
    if len(reference[0].losses) == case.num_steps:
        assert difference.weights <= WEIGHT_BOUND, f"{case.name}: after the last step weights differ: {difference}"
