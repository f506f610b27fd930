"""Everything that a training step works on, built from a configuration, a task and a mesh."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from megallm.agreement import on_every_rank
from megallm.config.batch_sizes import BatchSizes, batch_sizes_of
from megallm.config.operators import parse_choices
from megallm.config.report import counted
from megallm.config.tree import Config, OptimizerConfig, TrainingConfig
from megallm.data.feeding.orders import DataShare
from megallm.data_parallel.optimizer import BucketOptimizer
from megallm.data_parallel.reducer import GradientReducer
from megallm.layers.context import LayoutContext
from megallm.mesh import Mesh
from megallm.ops.library import check_choices
from megallm.optimizer.adamw import AdamWSettings
from megallm.optimizer.loss_scale import DynamicLossScale, DynamicLossScaleSettings, LossScale
from megallm.optimizer.rates import RateSchedules
from megallm.optimizer.sgd import SGDSettings
from megallm.pipeline.executor import PipelineExecutor
from megallm.plan.schedule import lowered_schedule
from megallm.plan.split import stage_layers
from megallm.schedule import LoweredSchedule
from megallm.train.rates import rate_schedules
from megallm.train.tasks.task import Task


@dataclass
class Progress:
    """Where a run stands.

    `position` (float64 scalar on the device) counts the samples of the steps that were not skipped: the learning rate
    follows it. `evaluation_due`: the evaluation after this step is still to come.
    """

    position: torch.Tensor
    num_updates: torch.Tensor
    iteration: int = 0
    consumed_samples: int = 0
    consumed_valid_samples: int = 0
    evaluation_due: bool = False


@dataclass
class Model:
    """A model in its layout, with what runs it: enough to evaluate and to generate.

    `chunks` are this rank's stages by their global number, `layers` the numbers of the layers in each.
    """

    config: Config
    task: Task
    mesh: Mesh
    context: LayoutContext
    layers: dict[int, range]
    chunks: dict[int, nn.Module]
    executor: PipelineExecutor

    def schedule(self, num_micro_batches: int, *, forward_only: bool = False) -> LoweredSchedule:
        """The verified schedule for one call of the executor."""
        return lowered_schedule(self.config.parallel, num_micro_batches, forward_only=forward_only)


@dataclass
class Engine(Model):
    """A model with everything that trains it."""

    reducer: GradientReducer
    optimizer: BucketOptimizer
    rates: RateSchedules
    batch_sizes: BatchSizes
    progress: Progress

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the next step on each data parallel rank."""
        return self.micro_batches_in(self.batch_sizes.at(self.progress.consumed_samples))

    @property
    def data_share(self) -> DataShare:
        """What this rank reads of the data."""
        return DataShare(self.config.training.micro_batch_size, self.mesh.coordinates["dp"], self.mesh.shape.dp)

    def micro_batches_in(self, batch_size: int) -> int:
        """Micro-batches of a global batch on each data parallel rank.

        Raises ValueError if they do not come out even.
        """
        micro_batch_size, replicas = self.config.training.micro_batch_size, self.mesh.shape.dp
        if batch_size % (micro_batch_size * replicas):
            raise ValueError(
                f"a batch of {batch_size} sequences cannot be cut into micro-batches of {micro_batch_size} on each of "
                f"{counted(replicas, 'data parallel rank')}: {batch_size} % ({micro_batch_size} x {replicas}) = "
                f"{batch_size % (micro_batch_size * replicas)}"
            )
        return batch_size // (micro_batch_size * replicas)


def build_model(config: Config, task: Task, mesh: Mesh) -> Model:
    """Builds and initialises this rank's stages.

    Called by all ranks with a resolved and validated configuration. Raises ValueError, the same on every rank, where
    a machine does not have the operators that were chosen.
    """
    training = config.training
    dtype = _dtype(training)
    operators = parse_choices(training.ops)
    on_every_rank(mesh, lambda: check_choices(operators, mesh.device))
    context = LayoutContext(
        tp=mesh.tp,
        sequence_parallel=config.parallel.sequence_parallel and mesh.tp.size > 1,
        dtype=dtype,
        device=mesh.device,
        seed=training.seed,
        operators=operators,
    )
    layers = _own_layers(config, mesh)
    last = mesh.shape.pp * config.parallel.num_virtual_stages_per_pipeline_rank - 1
    chunks = {
        stage: task.build_stage(config, own, context, is_first=stage == 0, is_last=stage == last)
        for stage, own in layers.items()
    }
    sequence = config.data.seq_length // (mesh.tp.size if context.sequence_parallel else 1)
    message = ((sequence, training.micro_batch_size, config.model.hidden_size), dtype)
    return Model(config, task, mesh, context, layers, chunks, PipelineExecutor(chunks, mesh, [message]))


def build_engine(config: Config, task: Task, mesh: Mesh) -> Engine:
    """Builds this rank's part of everything that training needs. Called by all ranks, as `build_model`."""
    model = build_model(config, task, mesh)
    parallel, settings = config.parallel, config.optimizer
    assert parallel.ddp_bucket_size, "the configuration is resolved"
    reducer = GradientReducer(
        model.chunks,
        mesh,
        model.context.weight_gradients,
        bucket_elements=parallel.ddp_bucket_size,
        sharded=parallel.use_distributed_optimizer,
        overlap=parallel.overlap_grad_reduce,
        decoupled=settings.decoupled_lr is not None,
        operators=model.context.operators,
    )
    model.executor.close_chunk = reducer.close_chunk
    optimizer = BucketOptimizer(
        reducer,
        mesh,
        _update_settings(settings),
        max_grad_norm=settings.clip_grad,
        overlap_gather=parallel.overlap_param_gather,
        loss_scale=_loss_scale(config.training, mesh.device),
        counts_zeros=config.logging.log_num_zeros_in_grad,
        operators=model.context.operators,
    )
    progress = Progress(
        torch.zeros((), dtype=torch.float64, device=mesh.device),
        torch.zeros((), dtype=torch.float32, device=mesh.device),
    )
    batch_sizes = batch_sizes_of(config)
    return Engine(
        **vars(model),
        reducer=reducer,
        optimizer=optimizer,
        rates=rate_schedules(config, batch_sizes),
        batch_sizes=batch_sizes,
        progress=progress,
    )


def _dtype(training: TrainingConfig) -> torch.dtype:
    """What weights and activations are kept in."""
    if training.fp64:
        return torch.float64
    if training.bf16:
        return torch.bfloat16
    return torch.float16 if training.fp16 else torch.float32


def _update_settings(settings: OptimizerConfig) -> AdamWSettings | SGDSettings:
    if settings.optimizer == "sgd":
        return SGDSettings(settings.sgd_momentum)
    return AdamWSettings(settings.adam_beta1, settings.adam_beta2, settings.adam_eps)


def _loss_scale(training: TrainingConfig, device: torch.device) -> LossScale:
    if not training.fp16:
        return LossScale(1.0, device)
    if training.loss_scale is not None:
        return LossScale(training.loss_scale, device)
    settings = DynamicLossScaleSettings(
        initial=training.initial_loss_scale,
        minimum=training.min_loss_scale,
        window=training.loss_scale_window,
        hysteresis=training.hysteresis,
    )
    return DynamicLossScale(settings, device)


def _own_layers(config: Config, mesh: Mesh) -> dict[int, range]:
    """Layers of this rank's stages, by the stage's global number."""
    ranges = stage_layers(config)
    return {stage: ranges[stage] for stage in range(mesh.pp.rank, len(ranges), mesh.shape.pp)}


def check_schedules(engine: Engine, last_sample: int) -> list[int]:
    """Verifies the schedule of every step that is still ahead, up to `last_sample`, and of the evaluations.

    Called by all ranks before the first step, when it is known where the run continues. Returns the different numbers
    of micro-batches, in their order.

    Raises ValueError if some batch cannot be cut evenly, and RuntimeError if ranks built different schedules.
    """
    sizes = engine.batch_sizes.sizes_within(last_sample, engine.progress.consumed_samples)
    numbers = [engine.micro_batches_in(size) for size in sizes]
    assert engine.config.training.global_batch_size, "the configuration is resolved"
    in_evaluation = engine.micro_batches_in(engine.config.training.global_batch_size)
    fingerprints = [engine.schedule(number).fingerprint() for number in numbers]
    fingerprints.append(engine.schedule(in_evaluation, forward_only=True).fingerprint())
    mine = int(hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:15], 16)
    extremes = torch.tensor([mine, -mine], dtype=torch.int64, device=engine.mesh.device)
    engine.mesh.world.all_reduce(extremes, "max")
    if extremes.tolist() != [mine, -mine]:
        raise RuntimeError(
            "ranks built different pipeline schedules: all must run with the same flags and the same version of megallm"
        )
    return numbers
