"""Messages that go through a copy in the host's memory, as those of processes that share a GPU over gloo do."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest

from megallm.communication import Transport
from tests.distributed.parity import Case, Outcome, References, compare, run_case
from tests.distributed.parity_cases import CASES
from tests.distributed.pool import WorkerPool


def run_staged(rank: int, case: Case) -> Outcome:
    """`run_case`, with the tensors of a CPU taken for a GPU's: what is sent and received is a copy."""
    with patch.object(Transport, "stages", lambda transport, tensor: transport.staged):
        return run_case(rank, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt, data, sharded, overlapped, delayed", "llama, tensor 2 pipeline 2, clipped, dropout"]
)
def test_copies_of_messages_change_nothing(pool: WorkerPool, name: str) -> None:
    (case,) = [replace(case, num_steps=3) for case in CASES if case.name == name]
    difference = compare(References(pool).of(case), pool.run(case.world_size, run_staged, case))
    assert difference.passes, f"{name}, where 1 is the bound: {difference}"
