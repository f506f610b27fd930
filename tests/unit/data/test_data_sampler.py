"""Every sample of a step goes to one rank and micro-batch, and which samples those are depends on no layout."""

import pytest

from megallm.data.feeding.sampler import GlobalBatchSampler

GLOBAL_BATCH = 24
LAYOUTS = [(micro, ranks) for micro in (1, 2, 3, 4, 6, 12, 24) for ranks in (1, 2, 3, 4, 6, 8, 12, 24)]
LAYOUTS = [(micro, ranks) for micro, ranks in LAYOUTS if GLOBAL_BATCH % (micro * ranks) == 0]


def single(num_samples, consumed_samples, micro_batch_size, rank, size):
    """Megatron's `single` loader: a group of micro_batch_size x size samples after the other, a slice for each rank."""
    group = []
    for sample in range(consumed_samples, num_samples):
        group.append(sample)
        if len(group) == micro_batch_size * size:
            yield group[rank * micro_batch_size : (rank + 1) * micro_batch_size]
            group = []


@pytest.mark.parametrize(("micro_batch_size", "size"), LAYOUTS)
@pytest.mark.parametrize("consumed_samples", [0, 24, 31])
def test_ledger(micro_batch_size, size, consumed_samples):
    num_samples = 110
    samplers = [
        GlobalBatchSampler(num_samples, consumed_samples, GLOBAL_BATCH, micro_batch_size, rank, size)
        for rank in range(size)
    ]
    steps = list(zip(*samplers, strict=True))
    assert len(steps) == len(samplers[0]) == (num_samples - consumed_samples) // GLOBAL_BATCH
    for step, ranks in enumerate(steps):
        places = [place for batches in ranks for batch in batches for place in batch]
        first = consumed_samples + step * GLOBAL_BATCH
        assert sorted(places) == [(first + place, place) for place in range(GLOBAL_BATCH)]
        assert all(len(batch) == micro_batch_size for batches in ranks for batch in batches)


@pytest.mark.parametrize(("micro_batch_size", "size"), LAYOUTS)
def test_micro_batches_are_those_of_megatron(micro_batch_size, size):
    for rank in range(size):
        sampler = GlobalBatchSampler(100, 5, GLOBAL_BATCH, micro_batch_size, rank, size)
        found = [[sample for sample, _ in batch] for step in sampler for batch in step]
        expected = list(single(100, 5, micro_batch_size, rank, size))
        assert found == expected[: len(found)]
        assert len(found) == len(sampler) * GLOBAL_BATCH // (micro_batch_size * size)


def test_resuming_goes_on_where_it_was():
    whole = list(GlobalBatchSampler(100, 0, 8, 2, 1, 2))
    assert whole[3:] == list(GlobalBatchSampler(100, 24, 8, 2, 1, 2))
    sampler = GlobalBatchSampler(100, 0, 8, 2, 1, 2)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize(("num_samples", "consumed_samples"), [(0, 0), (7, 0), (100, 93), (100, 100), (100, 200)])
def test_nothing_left(num_samples, consumed_samples):
    sampler = GlobalBatchSampler(num_samples, consumed_samples, 8, 1, 0, 1)
    assert len(sampler) == 0
    with pytest.raises(StopIteration):
        next(iter(sampler))


def test_mistakes():
    with pytest.raises(ValueError, match=r"\(2 x 5 = 10\); 20 or 30 can"):
        GlobalBatchSampler(100, 0, 24, 2, 0, 5)
    with pytest.raises(ValueError, match="= 10\\); 10 can"):
        GlobalBatchSampler(100, 0, 4, 2, 0, 5)
    with pytest.raises(ValueError, match="micro-batch size is 0"):
        GlobalBatchSampler(100, 0, 4, 0, 0, 5)
    with pytest.raises(ValueError, match="neither may be negative"):
        GlobalBatchSampler(100, -1, 4, 1, 0, 1)
