"""A plan: everything that is known of a run before it starts. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megallm.config.resolve import pipeline_schedule
from megallm.plan.flops import ModelFlops, flops_per_token, parameter_count
from megallm.plan.gpus import SAFE_SHARE, Gpu
from megallm.plan.memory import memory_of_rank
from megallm.plan.schedule import first_micro_batches, schedule_of
from megallm.plan.stages import Layout
from megallm.plan.timing import StepTime, Traffic, step_time, traffic
from megallm.schedule import LoweredSchedule, lower

# Forwards of all stages that are timed one by one; of a longer step the rest repeats the middle.
_MOST_TIMED = 3000
# Forwards of a filled pipeline that take too long to follow, half a second and more; fewer micro-batches stand for it.
# A pipeline is filled by as many micro-batches as ranks or, with virtual stages, by two groups: there are too many from
# 174 ranks of one stage on, 87 of two, 62 of four, 44 of eight, and from fewer where groups are larger.
_TOO_MANY = 30_000


@dataclass(frozen=True)
class Plan:
    """What one configuration needs and does on a number of GPUs.

    `memory` holds, for each pipeline rank, bytes of a process by kind (`megallm.plan.memory.KINDS`).
    """

    layout: Layout
    gpu: Gpu
    memory: list[dict[str, int]]
    step: StepTime
    traffic: dict[str, Traffic]
    flops: ModelFlops
    num_parameters: int

    @property
    def peak(self) -> int:
        """Bytes of the process that needs most."""
        return max(sum(kinds.values()) for kinds in self.memory)

    @property
    def share(self) -> float:
        """The same as a share of the GPU's memory."""
        return self.peak / self.gpu.memory

    @property
    def fits(self) -> bool:
        """Whether the peak leaves what fragments and workspaces are known to take."""
        return self.share <= SAFE_SHARE

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        config = self.layout.config
        assert config.training.global_batch_size, "the configuration is resolved"
        return config.training.global_batch_size * config.data.seq_length

    @property
    def flops_of_a_gpu(self) -> float:
        """Operations of the model per second and GPU, causal attention counted half."""
        return self.flops.half * self.tokens / self.layout.world_size / self.step.total

    @property
    def ideal_bubble(self) -> float:
        """The bubble of the same schedule if all stages took the same time and messages none."""
        ranks, micro_batches = self.layout.pipeline, self.layout.num_micro_batches
        return (ranks - 1) / (self.layout.virtual * micro_batches + ranks - 1)

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain values, for JSON: bytes, seconds, counts."""
        layout, step = self.layout, self.step
        return {
            "gpu": self.gpu.name,
            "world_size": layout.world_size,
            "layout": {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "virtual": layout.virtual,
                "data": layout.data,
                "schedule": pipeline_schedule(layout.config.parallel),
                "micro_batch_size": layout.sizes.batch,
                "num_micro_batches": layout.num_micro_batches,
                "recompute": layout.config.training.recompute_granularity,
            },
            "parameters": self.num_parameters,
            "flops_per_token": {"half_attention": self.flops.half, "full_attention": self.flops.full},
            "flops_per_step": {
                "half_attention": self.flops.half * self.tokens,
                "full_attention": self.flops.full * self.tokens,
            },
            "tokens_per_step": self.tokens,
            "stages": [
                {
                    "stage": stage.number,
                    "rank": stage.rank,
                    "layers": len(stage.layers),
                    "first_layer": stage.layers.start,
                    "parameters_of_a_process": stage.parameters.total,
                }
                for stage in layout.stages
            ],
            "memory_bytes": self.memory,
            "memory_peak_bytes": self.peak,
            "memory_share": self.share,
            "bubble": step.bubble,
            "traffic": {axis: {"messages": it.messages, "bytes": it.sent} for axis, it in self.traffic.items()},
            "seconds": {
                "step": step.total,
                "pipeline": step.pipeline,
                "gradients": step.gradients,
                "parameters": step.parameters,
                "optimizer": step.optimizer,
            },
            "tokens_per_second_per_gpu": self.tokens / layout.world_size / step.total,
            "flops_per_second_per_gpu": self.flops_of_a_gpu,
        }


def make_plan(layout: Layout, gpu: Gpu, most_timed: int = _MOST_TIMED) -> Plan:
    """The plan of a resolved and valid configuration with a known vocabulary.

    `most_timed` bounds the forwards whose times are followed one by one; where a step has more, fewer micro-batches
    stand for it.
    """
    model = layout.config.model
    lowered = _timed(layout, most_timed)
    return Plan(
        layout=layout,
        gpu=gpu,
        memory=[memory_of_rank(layout, rank, lowered) for rank in range(layout.pipeline)],
        step=step_time(layout, gpu, lowered),
        traffic=traffic(layout),
        flops=flops_per_token(model, layout.config.data.seq_length),
        num_parameters=parameter_count(model, layout.config.data.seq_length).total,
    )


def _timed(layout: Layout, most_timed: int) -> LoweredSchedule:
    parallel, stages, number = layout.config.parallel, layout.pipeline * layout.virtual, layout.num_micro_batches
    timed = first_micro_batches(parallel, number, most_timed // stages)
    if timed * stages > _TOO_MANY:
        # The interleaved schedule is itself in its first group. GPipe's step is told by the last of two.
        one_group = first_micro_batches(parallel, number, 1, num_groups=1)
        timed = one_group if layout.virtual > 1 else min(number, max(2, _TOO_MANY // 2 // stages))
    return lower(schedule_of(parallel, timed))
