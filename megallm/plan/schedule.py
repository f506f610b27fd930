"""The schedule of a configuration: the one that runs, and the one that a plan shows. Needs no torch."""

from __future__ import annotations

from functools import lru_cache

from megallm.config.resolve import pipeline_schedule
from megallm.config.tree import ParallelConfig
from megallm.schedule import BUILDERS, Action, LoweredSchedule, Schedule, build_schedule, lower, verify


def schedule_of(parallel: ParallelConfig, num_micro_batches: int, *, forward_only: bool = False) -> Schedule:
    """The compute order of one batch of `num_micro_batches` on each data parallel rank, cached."""
    name, ranks, virtual, group = _arguments(parallel)
    return build_schedule(
        name, ranks, virtual, num_micro_batches, forward_only=forward_only, micro_batch_group_size=group
    )


def order_of_rank(parallel: ParallelConfig, rank: int, num_micro_batches: int) -> tuple[list[Action], int]:
    """The same of one rank, with backward passes, and the pairs of stage and micro-batch that are in flight at most."""
    name, ranks, virtual, group = _arguments(parallel)
    return BUILDERS[name](rank, ranks, virtual, num_micro_batches, group or ranks)


def filling_micro_batches(parallel: ParallelConfig) -> int:
    """Micro-batches with which every rank holds as much as with any multiple of the pipeline's ranks more; under GPipe
    it holds one more with each."""
    size = parallel.pipeline_model_parallel_size
    return size if parallel.num_virtual_stages_per_pipeline_rank == 1 else 2 * size


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
