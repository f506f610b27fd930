"""One training step, and one evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megallm.device import Measures, Together
from megallm.train.engine import Engine
from megallm.train.loss import LossScaler

Batch = dict[str, torch.Tensor]


@dataclass
class StepMetrics:
    """Scalars of a step, still on the device. `losses` is float64 [terms], each term's mean over the global batch.

    `loss_scale` is that of the next step, as in Megatron's log. `global_batch_size` counts the samples of the step over
    all ranks. `more` holds what only some runs ask for, by name.
    """

    losses: torch.Tensor
    grad_norm: torch.Tensor
    learning_rate: torch.Tensor
    skipped: torch.Tensor
    loss_scale: torch.Tensor
    global_batch_size: int
    more: dict[str, torch.Tensor] = field(default_factory=dict)


def train_step(
    engine: Engine, micro_batches: list[Batch], passes: Measures | None = None, parts: Measures | None = None
) -> StepMetrics:
    """Forward and backward over this rank's micro-batches of the global batch, reduction, clipping, update.

    Waits for nothing on a GPU: every scalar stays on the device. `passes` measures each forward and backward pass,
    `parts` the parts of the step.
    """
    parts = parts or Together()
    scaler = _loss_scaler(engine, micro_batches)
    dropout_step = torch.full((), engine.progress.iteration, dtype=torch.int64, device=engine.mesh.device)
    with parts.measure("forward-backward"):
        engine.reducer.start_step(len(micro_batches))
        engine.executor.run(
            engine.schedule(len(micro_batches)),
            micro_batches,
            lambda outputs, batch: scaler(engine.task.loss_terms(outputs, batch, engine.context)),
            dropout_step,
            passes,
        )
    with parts.measure("all-grads-sync"):
        engine.reducer.finish_step()
    rates = engine.rates.at(engine.progress.position)
    with parts.measure("optimizer"):
        outcome = engine.optimizer.step(rates, _own_sums(engine, scaler))
    batch_size = len(micro_batches) * engine.config.training.micro_batch_size * engine.mesh.dp.size
    made = 1.0 - outcome.skipped
    engine.progress.position += made * batch_size
    engine.progress.num_updates += made
    engine.progress.iteration += 1
    engine.progress.consumed_samples += batch_size
    losses = outcome.sums / scaler.counts.clamp(min=1.0)
    more = {}
    if outcome.num_zeros is not None:
        more["num_zeros"] = outcome.num_zeros
    if engine.config.logging.log_params_norm:
        more["params_norm"] = engine.optimizer.weights_norm()
    if engine.rates.vocabulary is not None:
        more["decoupled_learning_rate"] = rates.vocabulary_learning_rate
    return StepMetrics(
        losses, outcome.grad_norm, rates.learning_rate, outcome.skipped, outcome.loss_scale, batch_size, more
    )


def evaluate_step(engine: Engine, micro_batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and counts of every loss term over one global batch, without dropout or gradients: two float64 [terms]."""
    engine.reducer.finish_gather()
    scaler = _loss_scaler(engine, micro_batches)
    engine.executor.run(
        engine.schedule(len(micro_batches), forward_only=True),
        micro_batches,
        lambda outputs, batch: scaler(engine.task.loss_terms(outputs, batch, engine.context)),
    )
    sums = _own_sums(engine, scaler)
    engine.mesh.world.all_reduce(sums)
    return sums, scaler.counts


def _loss_scaler(engine: Engine, micro_batches: list[Batch]) -> LossScaler:
    return LossScaler(_local_counts(engine, micro_batches), engine.mesh.dp, engine.optimizer.loss_scale.value)


def _local_counts(engine: Engine, micro_batches: list[Batch]) -> torch.Tensor:
    return torch.stack([engine.task.counts(batch) for batch in micro_batches]).double().sum(dim=0)


def _own_sums(engine: Engine, scaler: LossScaler) -> torch.Tensor:
    """This rank's part of the loss sums.

    Of the tensor ranks of the last stage, which all have it, the first one's counts.
    """
    mesh = engine.mesh
    if mesh.tp.rank == 0 and mesh.pp.rank == mesh.pp.size - 1:
        return scaler.sums
    return torch.zeros_like(scaler.sums)
