"""Layouts of up to eight processes that share one GPU, by the parity matrix's bounds: messages go through the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.distributed.parity import References, compare, run_case
from tests.distributed.parity_cases import CASES
from tests.distributed.pool import WorkerPool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# Each axis alone, then together.
CORE = (
    "gpt, tensor, both dropouts",
    "gpt tied, interleaved",
    "gpt, data, sharded, overlapped, delayed",
    "llama, tensor 2 pipeline 2, clipped, dropout",
    "llama, all axes, interleaved, sharded",
    "bert, all axes, sharded, selective, loss in chunks, smoothed, z-loss",
)


@pytest.fixture(scope="module")
def references() -> Iterator[References]:
    torch.cuda.empty_cache()  # what other tests had is needed by eight processes now
    pool = WorkerPool()
    yield References(pool)
    pool.close()


@pytest.mark.parametrize("name", CORE)
def test_processes_that_share_a_gpu_compute_what_one_computes(references: References, name: str) -> None:
    (case,) = [replace(case, device="cuda", num_steps=5) for case in CASES if case.name == name]
    difference = compare(references.of(case), references.pool.run(case.world_size, run_case, case))
    assert difference.passes, f"{name}, where 1 is the bound: {difference}"
