"""The global batch size of every step, as a function of the samples that were consumed before it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megallm.config.tree import Config

_MULTIPLES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class BatchSizes:
    """The size of the step that begins after so many consumed samples: a staircase.

    `stairs` are pairs (consumed samples, size) with rising first numbers, the first of them 0: the last pair that is
    reached holds. Everything that concerns the size of a batch asks here.
    """

    stairs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stairs]
        assert starts and starts[0] == 0 and starts == sorted(set(starts)), f"no staircase: {self.stairs}"
        assert all(size > 0 for _, size in self.stairs), f"a batch is empty: {self.stairs}"

    @classmethod
    def constant(cls, size: int) -> BatchSizes:
        """The same size for all steps."""
        return cls(((0, size),))

    @property
    def largest(self) -> int:
        """The largest size of all."""
        return max(size for _, size in self.stairs)

    def at(self, consumed_samples: int) -> int:
        """Size of the step that begins after `consumed_samples`."""
        return self.stairs[self._stair(consumed_samples)][1]

    def after(self, num_steps: int, consumed_samples: int = 0) -> int:
        """Consumed samples after `num_steps` more steps."""
        for start, size, num_here in self._runs(consumed_samples):
            if num_here is None or num_here >= num_steps:
                return start + num_steps * size
            num_steps -= num_here
        raise AssertionError("the last stair has no end")

    def steps_within(self, num_samples: int, consumed_samples: int = 0) -> int:
        """Whole steps from `consumed_samples` on that end at `num_samples` or before."""
        num_steps = 0
        for start, size, num_here in self._runs(consumed_samples):
            fitting = max(0, num_samples - start) // size
            if num_here is None or fitting < num_here:
                return num_steps + fitting
            num_steps += num_here
        raise AssertionError("the last stair has no end")

    def sizes_within(self, num_samples: int, consumed_samples: int = 0) -> list[int]:
        """The different sizes of the steps that `steps_within` counts, in their order."""
        sizes = []
        for start, size, _ in self._runs(consumed_samples):
            if start + size > num_samples:
                break
            sizes.append(size)
        return list(dict.fromkeys(sizes))

    def _stair(self, consumed_samples: int) -> int:
        return bisect_right(self.stairs, consumed_samples, key=lambda stair: stair[0]) - 1

    def _runs(self, consumed_samples: int) -> Iterator[tuple[int, int, int | None]]:
        """Steps of equal size one after another: (consumed samples before, size, number of steps; None: no end)."""
        while True:
            stair = self._stair(consumed_samples)
            size = self.stairs[stair][1]
            if stair + 1 == len(self.stairs):
                yield consumed_samples, size, None
                return
            num_steps = -(-(self.stairs[stair + 1][0] - consumed_samples) // size)
            yield consumed_samples, size, num_steps
            consumed_samples += num_steps * size


def batch_sizes_of(config: Config) -> BatchSizes:
    """The batch sizes of a configuration whose `global_batch_size` is given or resolved, or follows from its stairs.

    Raises ValueError with what is wrong with --rampup-batch-size or --step-batch-size-schedule.
    """
    training = config.training
    if training.step_batch_size_schedule is not None:
        return stepped(training.step_batch_size_schedule, config.data.seq_length)
    assert training.global_batch_size, "the configuration is resolved"
    if training.rampup_batch_size:
        return ramped(training.rampup_batch_size, training.global_batch_size)
    return BatchSizes.constant(training.global_batch_size)


def ramped(words: Sequence[str], global_batch_size: int) -> BatchSizes:
    """The ramp of `--rampup-batch-size START INCREMENT SAMPLES` up to `global_batch_size`, as Megatron climbs it.

    The n = (global_batch_size - START) / INCREMENT increments are spread evenly over SAMPLES: the step that begins
    after c consumed samples has START + floor(c / (SAMPLES / n)) x INCREMENT, both divisions in double precision.

    Raises ValueError if there are not three positive numbers, or the increments do not end at the global batch size.
    """
    if len(words) != 3 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"'{' '.join(words)}' are not three positive whole numbers")
    start, increment, samples = map(int, words)
    if start > global_batch_size:
        raise ValueError(f"the ramp starts at {start}, above the global batch size of {global_batch_size}")
    num_increments, rest = divmod(global_batch_size - start, increment)
    if rest:
        raise ValueError(
            f"increments of {increment} do not lead from {start} to the global batch size of {global_batch_size}: "
            f"({global_batch_size} - {start}) % {increment} = {rest}"
        )
    stairs = {0: start}
    for number in range(1, num_increments + 1):
        per_increment = samples / num_increments
        reached = -(-number * samples // num_increments)
        # Rounding may put the quotient of the very first sample below the whole number that it is.
        while int(reached / per_increment) < number and reached <= samples:
            reached += 1
        stairs[reached] = start + number * increment
    return BatchSizes(tuple(stairs.items()))


def stepped(text: str, seq_length: int) -> BatchSizes:
    """The sizes of `--step-batch-size-schedule "0:768 250B:1536"`: from so many tokens on, so many samples a batch.

    Numbers may end in K, M, B or T (10^3, 10^6, 10^9, 10^12); tokens are turned to samples by whole division by
    `seq_length`, as in Megatron.

    Raises ValueError if the text is no such list, does not begin at 0, or has two entries for one sample.
    """
    stairs: dict[int, int] = {}
    for entry in text.replace(",", " ").split():
        tokens, colon, size = entry.partition(":")
        start, batch = _number(tokens), _number(size)
        if not colon or start is None or not batch:
            raise ValueError(f"'{entry}' is not TOKENS:BATCH_SIZE")
        if start // seq_length in stairs:
            raise ValueError(f"two entries begin at sample {start // seq_length}, of {seq_length} tokens each")
        stairs[start // seq_length] = batch
    if 0 not in stairs:
        raise ValueError(f"'{text}' says nothing about the first step")
    return BatchSizes(tuple(sorted(stairs.items())))


def _number(word: str) -> int | None:
    multiple = _MULTIPLES.get(word[-1:].upper(), 1)
    try:
        value = float(word[:-1] if multiple > 1 else word)
        return int(value * multiple) if value >= 0 else None
    except (ValueError, OverflowError):
        return None
