"""The schedule of a configuration: the one that runs, and the one that a plan shows. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megallm.config.resolve import pipeline_schedule
from megallm.config.tree import ParallelConfig
from megallm.schedule import BUILDERS, Action, LoweredSchedule, Schedule, build_schedule, lower, verify
from megallm.schedule.builders import group_sizes


def schedule_of(parallel: ParallelConfig, num_micro_batches: int, *, forward_only: bool = False) -> Schedule:
    """The compute order of one batch of `num_micro_batches` on each data parallel rank, cached."""
    name, ranks, virtual, group = _arguments(parallel)
    return build_schedule(
        name, ranks, virtual, num_micro_batches, forward_only=forward_only, micro_batch_group_size=group
    )


def order_of_rank(parallel: ParallelConfig, rank: int, num_micro_batches: int) -> tuple[Sequence[Action], int]:
    """The same of one rank, with backward passes, and the pairs of stage and micro-batch that are in flight at most."""
    name, ranks, virtual, group = _arguments(parallel)
    return _order_of_rank(name, rank, ranks, virtual, num_micro_batches, group or ranks)


# Enough for the ranks of a long pipeline beside the first ranks of all layouts that are compared with it.
@lru_cache(maxsize=1024)
def _order_of_rank(
    name: str, rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int, group: int
) -> tuple[Sequence[Action], int]:
    return BUILDERS[name](rank, num_ranks, num_virtual, num_micro_batches, group)


def peak_micro_batches(parallel: ParallelConfig, number: int) -> int:
    """The micro-batches, at most `number`, with which every rank holds at its peak just what it holds with `number`.

    Under GPipe all of them, under 1F1B as many as ranks. Of the interleaved schedule a rank's forward passes are less
    than two groups ahead of its backward passes: what it holds comes again from group to group, but where a smaller
    group follows a larger one. So three groups of each size tell of all, and these are dealt as those of `number` are.
    """
    name, ranks, _, group = _arguments(parallel)
    if name != "interleaved":
        return number if name == "gpipe" else min(number, ranks)
    sizes = group_sizes(number, group or ranks)
    large = sizes.count(sizes[0]) if sizes[0] > sizes[-1] else 0
    return sum(sizes[:large][:3] + sizes[large:][:3])


def first_micro_batches(parallel: ParallelConfig, number: int, wished: int, num_groups: int = 2) -> int:
    """About `wished` of `number` micro-batches, more where these do not fill the pipeline: of the interleaved schedule
    the first groups, `num_groups` at least."""
    name, ranks, _, group = _arguments(parallel)
    if name != "interleaved":
        return min(number, max(2, ranks, wished))
    sizes = group_sizes(number, group or ranks)
    return sum(sizes[: max(num_groups, wished // sizes[0])])


def _arguments(parallel: ParallelConfig) -> tuple[str, int, int, int | None]:
    """Name of the schedule, pipeline ranks, stages of each, and micro-batches of a group if that is given."""
    name = pipeline_schedule(parallel)
    group = parallel.microbatch_group_size_per_virtual_pipeline_stage if name == "interleaved" else None
    return name, parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank, group


def lowered_schedule(
    parallel: ParallelConfig, num_micro_batches: int, *, forward_only: bool = False
) -> LoweredSchedule:
    """The same as what a rank runs, verified, cached."""
    return _verified(schedule_of(parallel, num_micro_batches, forward_only=forward_only))


@lru_cache(maxsize=64)
def _verified(schedule: Schedule) -> LoweredSchedule:
    lowered = lower(schedule)
    verify(lowered)
    return lowered
