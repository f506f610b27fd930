"""Everything that a training step works on, built from a configuration, a task and a mesh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megallm.config.tree import Config
from megallm.data_parallel.optimizer import BucketOptimizer
from megallm.data_parallel.reducer import GradientReducer
from megallm.layers.context import LayoutContext
from megallm.mesh import Mesh
from megallm.optimizer.adamw import AdamWSettings
from megallm.optimizer.learning_rate import LearningRateSchedule
from megallm.pipeline.executor import PipelineExecutor
from megallm.plan.split import head_cost_in_layers, split_layers
from megallm.schedule import LoweredSchedule, build_schedule, lower, verify
from megallm.train.tasks.task import Task


@dataclass
class Progress:
    """Where a run stands.

    `position` (float64 scalar on the device) counts the samples of the steps that were not skipped: the learning rate follows it.
    """

    position: torch.Tensor
    num_updates: torch.Tensor
    iteration: int = 0
    consumed_samples: int = 0
    consumed_valid_samples: int = 0


@dataclass
class Engine:
    """A model in its layout, ready to train."""

    config: Config
    task: Task
    mesh: Mesh
    context: LayoutContext
    chunks: dict[int, nn.Module]
    executor: PipelineExecutor
    reducer: GradientReducer
    optimizer: BucketOptimizer
    learning_rate: LearningRateSchedule
    progress: Progress

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step on each data parallel rank."""
        training = self.config.training
        assert training.global_batch_size, "the configuration is resolved"
        return training.global_batch_size // (training.micro_batch_size * self.mesh.shape.dp)

    def schedule(self, *, forward_only: bool = False, num_micro_batches: int | None = None) -> LoweredSchedule:
        """The verified schedule of one call of the executor."""
        return lowered_schedule(self.config, num_micro_batches or self.num_micro_batches, forward_only)


def lowered_schedule(config: Config, num_micro_batches: int, forward_only: bool) -> LoweredSchedule:
    """Builds, lowers and verifies the schedule that the configuration names. Repeated calls are answered from the schedule caches."""
    parallel = config.parallel
    name = parallel.pipeline_schedule
    if name == "auto":
        name = "interleaved" if parallel.num_virtual_stages_per_pipeline_rank > 1 else "1f1b"
    schedule = build_schedule(
        name,
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
        num_micro_batches,
        forward_only=forward_only,
    )
    return lower(schedule)


def build_engine(config: Config, task: Task, mesh: Mesh) -> Engine:
    """Builds this rank's part of everything. Called by all ranks with a resolved and validated configuration."""
    training, parallel = config.training, config.parallel
    dtype = torch.float64 if training.fp64 else torch.bfloat16 if training.bf16 else torch.float32
    context = LayoutContext(
        tp=mesh.tp,
        sequence_parallel=parallel.sequence_parallel and mesh.tp.size > 1,
        dtype=dtype,
        device=mesh.device,
        seed=training.seed,
    )
    chunks = _build_chunks(config, task, mesh, context)
    assert parallel.ddp_bucket_size, "the configuration is resolved"
    reducer = GradientReducer(
        chunks,
        mesh,
        context.weight_gradients,
        bucket_elements=parallel.ddp_bucket_size,
        sharded=parallel.use_distributed_optimizer,
        overlap=parallel.overlap_grad_reduce,
    )
    settings = config.optimizer
    optimizer = BucketOptimizer(
        reducer,
        mesh,
        AdamWSettings(settings.adam_beta1, settings.adam_beta2, settings.adam_eps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip_grad,
        overlap_gather=parallel.overlap_param_gather,
    )
    sequence = config.data.seq_length // (mesh.tp.size if context.sequence_parallel else 1)
    message = ((sequence, training.micro_batch_size, config.model.hidden_size), dtype)
    executor = PipelineExecutor(chunks, mesh, [message], reducer.close_chunk)
    engine = Engine(
        config,
        task,
        mesh,
        context,
        chunks,
        executor,
        reducer,
        optimizer,
        _learning_rate_schedule(config),
        Progress(
            torch.zeros((), dtype=torch.float64, device=mesh.device),
            torch.zeros((), dtype=torch.float32, device=mesh.device),
        ),
    )
    _verify_schedule(engine)
    return engine


def _build_chunks(config: Config, task: Task, mesh: Mesh, context: LayoutContext) -> dict[int, nn.Module]:
    """This rank's stages by their global number: stage s lives on pipeline rank s mod pipeline size."""
    size = mesh.shape.pp
    num_stages = size * config.parallel.num_virtual_stages_per_pipeline_rank
    head_cost = head_cost_in_layers(config.model, config.data.seq_length)
    ranges = split_layers(config.model.num_layers, num_stages, embedding_cost=0.0, head_cost=head_cost)
    return {
        stage: task.build_stage(
            config, ranges[stage], context, is_first=stage == 0, is_last=stage == num_stages - 1
        )
        for stage in range(mesh.pp.rank, num_stages, size)
    }


def _learning_rate_schedule(config: Config) -> LearningRateSchedule:
    settings, batch = config.optimizer, config.training.global_batch_size
    assert batch and settings.lr_decay_iters, "the configuration is resolved"
    return LearningRateSchedule(
        peak=settings.lr,
        minimum=settings.min_lr,
        style=settings.lr_decay_style,
        warmup_samples=settings.lr_warmup_iters * batch,
        decay_samples=settings.lr_decay_iters * batch,
        warmup_start=settings.lr_warmup_init,
    )


def _verify_schedule(engine: Engine) -> None:
    """Proves the schedule and makes sure that every rank runs the same one."""
    lowered = engine.schedule()
    verify(lowered)
    mine = int(lowered.fingerprint()[:15], 16)
    extremes = torch.tensor([mine, -mine], dtype=torch.int64, device=engine.mesh.device)
    engine.mesh.world.all_reduce(extremes, "max")
    if extremes.tolist() != [mine, -mine]:
        raise RuntimeError(
            "ranks built different pipeline schedules: all must run with the same flags and the same version of megallm"
        )
