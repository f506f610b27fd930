"""The schedule of a configuration: the one that runs, and the one that a plan shows. Needs no torch."""

from __future__ import annotations

from functools import lru_cache

from megallm.config.resolve import pipeline_schedule
from megallm.config.tree import ParallelConfig
from megallm.schedule import LoweredSchedule, build_schedule, lower, verify


def lowered_schedule(
    parallel: ParallelConfig, num_micro_batches: int, *, forward_only: bool = False
) -> LoweredSchedule:
    """The verified schedule of one batch of `num_micro_batches` on each data parallel rank, cached."""
    name = pipeline_schedule(parallel)
    return _verified(
        name,
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
        num_micro_batches,
        forward_only,
        parallel.microbatch_group_size_per_virtual_pipeline_stage if name == "interleaved" else None,
    )


@lru_cache(maxsize=64)
def _verified(
    name: str,
    num_ranks: int,
    num_virtual_stages: int,
    num_micro_batches: int,
    forward_only: bool,
    micro_batch_group_size: int | None,
) -> LoweredSchedule:
    lowered = lower(
        build_schedule(
            name,
            num_ranks,
            num_virtual_stages,
            num_micro_batches,
            forward_only=forward_only,
            micro_batch_group_size=micro_batch_group_size,
        )
    )
    verify(lowered)
    return lowered
