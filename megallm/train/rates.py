"""Learning rates and weight decay over a run, as its configuration says."""

from __future__ import annotations

from dataclasses import replace

from megallm.config.batch_sizes import BatchSizes
from megallm.config.resolve import (
    learning_rate_decay_samples,
    learning_rate_warmup_samples,
    train_samples,
    wsd_decay_samples,
)
from megallm.config.tree import Config
from megallm.optimizer.learning_rate import LearningRateSchedule
from megallm.optimizer.rates import RateSchedules, WeightDecaySchedule


def rate_schedules(config: Config, batch_sizes: BatchSizes) -> RateSchedules:
    """The schedules of a resolved configuration, every length in samples."""
    settings = config.optimizer
    learning_rate = LearningRateSchedule(
        peak=settings.lr,
        minimum=settings.min_lr,
        style=settings.lr_decay_style,
        warmup_samples=learning_rate_warmup_samples(config, batch_sizes),
        decay_samples=learning_rate_decay_samples(config, batch_sizes),
        warmup_start=settings.lr_warmup_init,
        wsd_decay_samples=wsd_decay_samples(config, batch_sizes),
        wsd_decay_style=settings.lr_wsd_decay_style,
    )
    vocabulary = None
    if settings.decoupled_lr is not None:
        minimum = settings.min_lr if settings.decoupled_min_lr is None else settings.decoupled_min_lr
        vocabulary = replace(learning_rate, peak=settings.decoupled_lr, minimum=minimum)
    return RateSchedules(learning_rate, _weight_decay(config, batch_sizes), vocabulary)


def _weight_decay(config: Config, batch_sizes: BatchSizes) -> WeightDecaySchedule:
    settings, samples = config.optimizer, train_samples(config, batch_sizes)
    if settings.weight_decay_incr_style == "constant":
        return WeightDecaySchedule(settings.weight_decay, settings.weight_decay, "constant", samples)
    start, end = settings.start_weight_decay, settings.end_weight_decay
    assert start is not None and end is not None, "the configuration is validated"
    return WeightDecaySchedule(start, end, settings.weight_decay_incr_style, samples)
