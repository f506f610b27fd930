"""Where the ranges of the distributed optimizer lie."""

from __future__ import annotations

import pytest

from megallm.checkpoint.boxes import shard_boxes
from megallm.data_parallel.buckets import ALIGNMENT
from tests.distributed.parity import GPT, Case, make_engine
from tests.distributed.parity_cases import ODD_VOCABULARY, OVERLAPPED
from tests.distributed.pool import WorkerPool


def places(rank: int, case: Case) -> tuple[list[int], list[int], int, int]:
    """Addresses at which this rank's ranges and their state begin, elements of a bucket at which they and parameters
    begin, elements of them, and elements of what is saved."""
    engine = make_engine(rank, case)
    tensors = [
        tensor
        for shard in engine.optimizer.shards
        for tensor in (shard.master, shard.gradient, shard.rounded, *shard.state.moments().values())
        if tensor is not None and tensor.numel()
    ]
    boxes = [box for shard in engine.optimizer.shards for box in shard_boxes("", shard, shard.master)]
    held = sum(shard.master.numel() for shard in engine.optimizer.shards)
    buckets = [shard.bucket for shard in engine.optimizer.shards]
    begins = [begin for bucket in buckets for begin in (bucket.shard.start, *(it.begin for it in bucket.members))]
    engine.mesh.close()
    return (
        [tensor.data_ptr() for tensor in tensors],
        begins,
        held,
        sum(box.tensor.numel() for box in boxes if box.saves),
    )


@pytest.mark.parametrize("precision", [{}, {"training.fp64": False, "training.bf16": True}], ids=["fp64", "bf16"])
def test_shares_begin_at_16_bytes_and_nothing_between_is_saved(pool: WorkerPool, precision: dict[str, bool]) -> None:
    """With 51 words, MLPs of 65 features and buckets of 2,000 elements nothing comes out even."""
    odd = ODD_VOCABULARY | {"model.ffn_hidden_size": 65}
    case = Case("", GPT | odd | precision, dp=2, layout=OVERLAPPED)
    ranks = pool.run(2, places, case)
    assert all(address % 16 == 0 for addresses, *_ in ranks for address in addresses)
    assert all(begin % ALIGNMENT == 0 for _, begins, *_ in ranks for begin in begins)
    layers = 4 * (4 * 32 * 32 + 2 * 65 * 32 + 9 * 32 + 65)
    assert sum(saved for *_, saved in ranks) == 51 * 32 + 16 * 32 + layers + 2 * 32
    assert sum(held for *_, held, _ in ranks) > 51 * 32 + 16 * 32 + layers + 2 * 32
