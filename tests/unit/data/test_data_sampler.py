"""Every sample of a step goes to one rank and micro-batch, and which samples those are depends on no layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.config.batch_sizes import BatchSizes, ramped
from megallm.data.feeding.orders import CyclicOrder, DataShare, SingleOrder, build_order, layout_in_order
from megallm.data.feeding.sampler import GlobalBatchSampler

GLOBAL_BATCH = 24
LAYOUTS = [(micro, ranks) for micro in (1, 2, 3, 4, 6, 12, 24) for ranks in (1, 2, 3, 4, 6, 8, 12, 24)]
LAYOUTS = [(micro, ranks) for micro, ranks in LAYOUTS if GLOBAL_BATCH % (micro * ranks) == 0]


def steps_of(num_samples, consumed_samples, batch_sizes, micro_batch_size, size, kind="single", sharding=True):
    """All steps of all ranks: for each step a list of (place, sample), sorted by place, and its micro-batches."""
    if isinstance(batch_sizes, int):
        batch_sizes = BatchSizes.constant(batch_sizes)
    shares = [DataShare(micro_batch_size, rank, size) for rank in range(size)]
    orders = [build_order(kind, num_samples, share, sharding=sharding) for share in shares]
    samplers = [
        GlobalBatchSampler(order, consumed_samples, batch_sizes, share)
        for order, share in zip(orders, shares, strict=True)
    ]
    for ranks in zip(*samplers, strict=True) if kind == "single" else zip(*samplers, strict=False):
        pairs = [
            pair
            for batches in ranks
            for samples, places in batches
            for pair in zip(places.tolist(), samples.tolist(), strict=True)
        ]
        yield sorted(pairs), ranks


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
    steps = list(steps_of(num_samples, consumed_samples, GLOBAL_BATCH, micro_batch_size, size))
    assert len(steps) == (num_samples - consumed_samples) // GLOBAL_BATCH
    for step, (pairs, ranks) in enumerate(steps):
        first = consumed_samples + step * GLOBAL_BATCH
        assert pairs == [(place, first + place) for place in range(GLOBAL_BATCH)]
        assert all(len(samples) == micro_batch_size for batches in ranks for samples, _ in batches)


@st.composite
def runs_with_a_resume(draw):
    """A staircase of sizes and two layouts that divide all of them, with the step where the second takes over."""
    layouts = [(draw(st.integers(1, 4)), draw(st.integers(1, 6))) for _ in range(2)]
    unit = int(np.lcm.reduce([micro * size for micro, size in layouts]))
    if draw(st.booleans()):
        start, increments = unit * draw(st.integers(1, 3)), draw(st.integers(0, 5))
        increment = unit * draw(st.integers(1, 2))
        samples = draw(st.integers(1, 40 * unit))
        sizes = ramped([str(start), str(increment), str(samples)], start + increments * increment)
    else:
        starts = sorted({0} | set(draw(st.lists(st.integers(1, 40 * unit), max_size=4))))
        sizes = BatchSizes(tuple((start, unit * draw(st.integers(1, 5))) for start in starts))
    return sizes, layouts, unit * draw(st.integers(1, 60)) + draw(st.integers(0, 5)), draw(st.integers(0, 8))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(runs_with_a_resume())
def test_no_resume_loses_or_repeats_a_sample(run):
    """The ledger: whatever the layouts before and after, each step has exactly the uninterrupted run's samples."""
    sizes, (before, after), num_samples, resumed = run
    whole = [pairs for pairs, _ in steps_of(num_samples, 0, sizes, 1, 1)]
    first = [pairs for pairs, _ in steps_of(num_samples, 0, sizes, *before)][:resumed]
    consumed = sum(map(len, first))
    assert consumed == sizes.after(len(first))
    rest = [pairs for pairs, _ in steps_of(num_samples, consumed, sizes, *after)]
    assert first + rest == whole
    seen = [sample for pairs in whole for _, sample in pairs]
    assert seen == list(range(len(seen)))
    assert num_samples - len(seen) < sizes.at(len(seen))
    assert len(whole) == sizes.steps_within(num_samples)


@pytest.mark.parametrize(("micro_batch_size", "size"), LAYOUTS)
def test_micro_batches_are_those_of_megatron(micro_batch_size, size):
    steps = list(steps_of(100, 5, GLOBAL_BATCH, micro_batch_size, size))
    for rank in range(size):
        found = [samples.tolist() for _, ranks in steps for samples, _ in ranks[rank]]
        expected = list(single(100, 5, micro_batch_size, rank, size))
        assert found == expected[: len(found)]
        assert len(found) == len(steps) * GLOBAL_BATCH // (micro_batch_size * size)


def cyclic(num_samples, consumed_samples, micro_batch_size, rank, size, sharding):
    """Megatron's `cyclic` loader, written down from its description: one epoch, from `consumed_samples` to its end."""
    group = micro_batch_size * size
    length = num_samples - num_samples % group
    epoch, within = divmod(consumed_samples, length)
    generator = torch.Generator()
    generator.manual_seed(epoch)
    if sharding:
        bucket = num_samples // group * micro_batch_size
        shuffled = torch.randperm(bucket, generator=generator).tolist()
        own = [rank * bucket + sample for sample in shuffled[within // size :]]
    else:
        whole = num_samples // micro_batch_size * micro_batch_size
        own = torch.randperm(whole, generator=generator).tolist()[within:length][rank::size]
    return [own[start : start + micro_batch_size] for start in range(0, len(own), micro_batch_size)]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 30), st.integers(0, 40), st.booleans())
def test_cyclic_order_is_that_of_megatron(micro_batch_size, size, groups, extra, groups_consumed, sharding):
    group = micro_batch_size * size
    num_samples = group * groups + extra
    length = num_samples // group * group
    for rank in range(size):
        share = DataShare(micro_batch_size, rank, size)
        order = CyclicOrder(num_samples, share, sharding=sharding)
        expected, consumed = [], groups_consumed * group
        while len(expected) < 6:
            rest = cyclic(num_samples, consumed, micro_batch_size, rank, size, sharding)
            expected += rest
            consumed += len(rest) * group
            assert consumed % length == 0
        found = [order.read((groups_consumed + number) * group).tolist() for number in range(len(expected))]
        assert found == expected


def test_cyclic_golden_values():
    """torch's generator must not change under us, nor the dealing."""
    share = DataShare(2, 1, 2)
    assert CyclicOrder(11, share, sharding=True).read(0).tolist() == [4, 5]
    assert CyclicOrder(11, share, sharding=False).read(8).tolist() == [6, 2]


@pytest.mark.parametrize("sharding", [True, False])
def test_cyclic_epochs_read_every_sample_once(sharding):
    steps = [pairs for (pairs, _), _ in zip(steps_of(26, 0, 12, 2, 3, "cyclic", sharding), range(6), strict=False)]
    for epoch in range(3):
        samples = sorted(sample for pairs in steps[2 * epoch : 2 * epoch + 2] for _, sample in pairs)
        assert len(set(samples)) == 24
        assert [place for place, _ in steps[epoch]] == list(range(12))
    assert steps[:2] != steps[2:4] != steps[4:]


def test_unsharded_cyclic_order_depends_on_no_layout_where_batches_divide_the_samples():
    def first_steps(*layout):
        steps = steps_of(48, 24, GLOBAL_BATCH, *layout, "cyclic", False)
        return [pairs for (pairs, _), _ in zip(steps, range(5), strict=False)]

    wanted = first_steps(1, 1)
    key = layout_in_order("cyclic", 48, DataShare(1), sharding=False)
    for micro_batch_size, size in LAYOUTS:
        assert first_steps(micro_batch_size, size) == wanted
        assert layout_in_order("cyclic", 48, DataShare(micro_batch_size, 0, size), sharding=False) == key


def test_what_an_order_takes_from_the_layout():
    share, other = DataShare(2, 0, 3), DataShare(3, 0, 2)
    assert layout_in_order("single", 50, share, sharding=True) == ""
    assert layout_in_order("cyclic", 50, share, sharding=True) != layout_in_order("cyclic", 50, other, sharding=True)
    assert layout_in_order("cyclic", 50, share, sharding=False) != layout_in_order("cyclic", 50, other, sharding=False)


def test_resuming_goes_on_where_it_was():
    def listed(consumed):
        return [pairs for pairs, _ in steps_of(100, consumed, 8, 2, 2)]

    assert listed(0)[3:] == listed(24)
    sampler = GlobalBatchSampler(SingleOrder(100, DataShare(2, 1, 2)), 0, BatchSizes.constant(8), DataShare(2, 1, 2))
    assert np.array_equal(list(sampler), list(sampler))


@pytest.mark.parametrize(("num_samples", "consumed_samples"), [(0, 0), (7, 0), (100, 93), (100, 100), (100, 200)])
def test_nothing_left(num_samples, consumed_samples):
    assert list(steps_of(num_samples, consumed_samples, 8, 1, 1)) == []


def test_mistakes():
    with pytest.raises(ValueError, match=r"\(2 x 5 = 10\); 20 or 30 can"):
        list(steps_of(100, 0, 24, 2, 5))
    with pytest.raises(ValueError, match="= 10\\); 10 can"):
        list(steps_of(100, 0, 4, 2, 5))
    with pytest.raises(ValueError, match="micro-batch size is 0"):
        list(steps_of(100, 0, 4, 0, 1))
    with pytest.raises(ValueError, match="-1 samples are consumed"):
        list(steps_of(100, -1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"5 samples do not fill one micro-batch of 2 on each of 3 .*\(2 x 3 = 6\)"):
        CyclicOrder(5, DataShare(2, 0, 3), sharding=True)
