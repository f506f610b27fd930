"""The schedule of a configuration: the one that runs, and the one that a plan shows. Needs no torch."""

from __future__ import annotations

from functools import lru_cache

from megallm.config.resolve import pipeline_schedule
from megallm.config.tree import ParallelConfig
from megallm.schedule import LoweredSchedule, Schedule, build_schedule, lower, verify


def schedule_of(parallel: ParallelConfig, num_micro_batches: int, *, forward_only: bool = False) -> Schedule:
    """The compute order of one batch of `num_micro_batches` on each data parallel rank, cached."""
    name = pipeline_schedule(parallel)
    group = parallel.microbatch_group_size_per_virtual_pipeline_stage
    return build_schedule(
        name,
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
        num_micro_batches,
        forward_only=forward_only,
        micro_batch_group_size=group if name == "interleaved" else None,
    )


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
