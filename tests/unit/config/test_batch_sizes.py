"""The size of every global batch: Megatron's ramp and stairs, and what follows from them, against plain walks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.config import resolve
from megallm.config.batch_sizes import BatchSizes, ramped, stepped
from megallm.config.dictionary import build
from megallm.config.resolve import learning_rate_decay_samples, learning_rate_warmup_samples, train_samples

BASE = {"training.micro_batch_size": 2, "data.seq_length": 64, "model.num_attention_heads": 1}


def megatron_ramp(start, increment, samples, end, consumed):
    """Megatron's arithmetic, from its description: a division in double precision, then the whole part."""
    if consumed > samples:
        return end
    return start + int(consumed / (samples / ((end - start) // increment))) * increment


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 30), st.integers(1, 3000), st.data())
def test_ramp_is_that_of_megatron(start, increment, increments, samples, data):
    end = start + increment * increments
    sizes = ramped([str(start), str(increment), str(samples)], end)
    for consumed in [*range(0, samples + 2, max(1, samples // 50)), data.draw(st.integers(0, samples)), samples]:
        # At the last sample of the ramp rounding may put Megatron one increment beyond the end, where it stops.
        assert sizes.at(consumed) == min(end, megatron_ramp(start, increment, samples, end, consumed))


@pytest.mark.parametrize("increments", [3, 7, 10, 49, 63])
def test_rounding_at_the_first_sample_of_an_increment(increments):
    for samples in range(1, 400):
        sizes = ramped(["1", "1", str(samples)], 1 + increments)
        assert [sizes.at(n) for n in range(samples + 3)] == [
            megatron_ramp(1, 1, samples, 1 + increments, n) for n in range(samples + 3)
        ]


def test_a_known_ramp():
    """GPT-3's in Megatron's examples: 16 to 1536 by 16 over 5,859,375 samples."""
    sizes = ramped(["16", "16", "5859375"], 1536)
    assert (sizes.at(0), sizes.at(61_677), sizes.at(61_679)) == (16, 16, 32)
    assert (sizes.at(5_859_374), sizes.at(5_859_375), sizes.largest) == (1520, 1536, 1536)
    assert ramped(["8", "4", "100"], 8) == BatchSizes.constant(8)


@st.composite
def staircases(draw):
    starts = sorted({0} | set(draw(st.lists(st.integers(1, 300), max_size=6))))
    return BatchSizes(tuple((start, draw(st.integers(1, 40))) for start in starts))


@settings(max_examples=300, deadline=None)
@given(staircases(), st.integers(0, 320), st.integers(0, 60))
def test_steps_are_counted_as_a_walk_counts_them(sizes, consumed, num_steps):
    position, walked = consumed, []
    for _ in range(num_steps):
        walked.append(sizes.at(position))
        position += walked[-1]
    assert sizes.after(num_steps, consumed) == position
    for end in (position, position + sizes.at(position) - 1):
        assert sizes.steps_within(end, consumed) == num_steps
        assert set(sizes.sizes_within(end, consumed)) == set(walked)
    if num_steps:
        assert sizes.steps_within(position - 1, consumed) == num_steps - 1


def test_stairs():
    assert stepped("0:768 250B:1536, 500b:3072 0.75T:6144", 2048).stairs == (
        (0, 768),
        (250 * 10**9 // 2048, 1536),
        (500 * 10**9 // 2048, 3072),
        (750 * 10**9 // 2048, 6144),
    )
    assert stepped("1K:16 0:8 2M:24", 10).stairs == ((0, 8), (100, 16), (200_000, 24))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["16", "16"], "'16 16' are not three positive whole numbers"),
        (["16", "16", "-1"], "not three positive"),
        (["16", "16", "0"], "not three positive"),
        (["72", "1", "10"], "starts at 72, above the global batch size of 64"),
        (["16", "20", "10"], r"increments of 20 do not lead from 16 to .* 64: \(64 - 16\) % 20 = 8"),
    ],
)
def test_mistakes_of_a_ramp(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        ramped(words, 64)


def test_lengths_in_steps_and_in_samples():
    ramp = {"training.rampup_batch_size": ["4", "4", "40"], "training.global_batch_size": 12}
    by_samples = resolve(build(BASE | ramp | {"training.train_samples": 100}), 2)
    sizes = BatchSizes(((0, 4), (20, 8), (40, 12)))
    assert by_samples.training.train_iters == 5 + 3 + 4  # 20, 44 and 92 samples
    assert resolve(by_samples, 2) == by_samples
    assert train_samples(by_samples, sizes) == learning_rate_decay_samples(by_samples, sizes) == 100
    by_steps = resolve(
        build(
            BASE | ramp | {"training.train_iters": 12, "optimizer.lr_decay_iters": 8, "optimizer.lr_warmup_iters": 6}
        ),
        2,
    )
    assert train_samples(by_steps, sizes) == 92
    assert learning_rate_decay_samples(by_steps, sizes) == 44
    assert learning_rate_warmup_samples(by_steps, sizes) == 28
    assert resolve(by_steps, 2) == by_steps
    stairs = resolve(build(BASE | {"training.step_batch_size_schedule": "0:4 1K:8", "training.train_iters": 9}), 2)
    assert stairs.training.global_batch_size == 8
    assert train_samples(stairs, BatchSizes(((0, 4), (15, 8)))) == 16 + 5 * 8
