"""Micro-batches in page-locked memory, read by processes that are forked from one that uses the GPU."""

from __future__ import annotations

import pytest
import torch

from megallm.config.batch_sizes import BatchSizes
from megallm.data.feeding.loader import build_loader
from megallm.data.feeding.orders import DataShare, SingleOrder
from megallm.data.feeding.sampler import GlobalBatchSampler
from megallm.data.samples.mock import MockDataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_micro_batches_reach_the_gpu_whole(num_workers: int) -> None:
    busy = torch.randn(2048, 2048, device="cuda")
    dataset, share = MockDataset(64, 256, 1000, 3), DataShare(2, 1, 2)
    sampler = GlobalBatchSampler(SingleOrder(64, share), 0, BatchSizes(((0, 4), (8, 8))), share)
    sent = []
    for step in build_loader(dataset, sampler, num_workers, pin_memory=True):
        for batch in step:
            assert all(tensor.is_pinned() for tensor in batch.values())
            # The copies wait behind these products; meanwhile the workers overwrite what they have read.
            for _ in range(20):
                busy = busy @ busy / 100
            sent.append({name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()})
    wanted = [batch for step in build_loader(dataset, sampler) for batch in step]
    assert len(sent) == len(wanted) == 2 + 2 * 7
    for ours, theirs in zip(sent, wanted, strict=True):
        assert all(torch.equal(ours[name].cpu(), theirs[name]) for name in theirs)
