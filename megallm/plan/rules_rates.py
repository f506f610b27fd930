"""Rules about learning rate and weight decay over a run."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.config.resolve import learning_rate_decay_samples, learning_rate_warmup_samples, wsd_decay_samples
from megallm.config.tree import Config
from megallm.plan.problem import Problem, rule
from megallm.plan.rules_batches import BATCH_SIZE_FIELDS, batch_sizes_or_none


@rule("optimizer.lr", "optimizer.min_lr")
def minimum_is_below_peak(config: Config, world_size: int) -> Iterator[Problem]:
    """The learning rate decays from its peak down to its minimum."""
    peak, minimum = config.optimizer.lr, config.optimizer.min_lr
    if minimum > peak:
        yield Problem(
            ("--min-lr", "--lr"),
            "the learning rate would decay upwards",
            f"{minimum} > {peak}",
            f"use --min-lr {peak / 10:g}, or at most --lr's {peak}",
        )


@rule("optimizer.lr", "optimizer.lr_warmup_init")
def warmup_starts_below_peak(config: Config, world_size: int) -> Iterator[Problem]:
    """The learning rate warms up from its start to its peak."""
    peak, start = config.optimizer.lr, config.optimizer.lr_warmup_init
    if start > peak:
        yield Problem(
            ("--lr-warmup-init", "--lr"),
            "the learning rate would warm up downwards",
            f"{start} > {peak}",
            f"use --lr-warmup-init 0.0, or at most --lr's {peak}",
        )


@rule("optimizer.lr_warmup_iters", "optimizer.lr_decay_iters", "training.train_iters")
def warmup_ends_before_decay(config: Config, world_size: int) -> Iterator[Problem]:
    """The warm-up is a part of the steps over which the learning rate decays."""
    settings = config.optimizer
    warmup, given = settings.lr_warmup_iters, settings.lr_decay_iters
    by_samples = settings.lr_decay_samples is not None or (given is None and config.training.train_samples is not None)
    if settings.lr_warmup_samples or settings.lr_warmup_fraction is not None or by_samples:
        return
    decay = config.training.train_iters if given is None else given
    if warmup > decay:
        source = "--train-iters, the default of --lr-decay-iters" if given is None else "--lr-decay-iters"
        yield Problem(
            ("--lr-warmup-iters", "--lr-decay-iters"),
            f"a warm-up of {warmup} steps does not fit into the {decay} steps of {source}",
            f"{warmup} > {decay}",
            f"use --lr-warmup-iters {decay} or less, or --lr-decay-iters {warmup} or more",
        )


@rule(
    "optimizer.lr_warmup_iters",
    "optimizer.lr_warmup_samples",
    "optimizer.lr_decay_iters",
    "optimizer.lr_decay_samples",
    "training.train_iters",
    "training.train_samples",
    *BATCH_SIZE_FIELDS,
)
def warmup_samples_end_before_decay(config: Config, world_size: int) -> Iterator[Problem]:
    """The same, where warm-up or decay are given in samples."""
    settings = config.optimizer
    by_steps = settings.lr_decay_iters is not None or config.training.train_samples is None
    sizes = batch_sizes_or_none(config, world_size)
    if sizes is None or (by_steps and settings.lr_decay_samples is None and not settings.lr_warmup_samples):
        return
    if settings.lr_warmup_fraction is not None:
        return
    warmup, decay = learning_rate_warmup_samples(config, sizes), learning_rate_decay_samples(config, sizes)
    if warmup > decay:
        yield Problem(
            ("--lr-warmup-samples", "--lr-decay-samples"),
            f"a warm-up of {warmup} samples does not fit into the {decay} over which the learning rate decays",
            f"{warmup} > {decay}",
            f"use --lr-warmup-samples {decay} or less, or --lr-decay-samples {warmup} or more",
        )


@rule()
def one_unit_of_the_schedule(config: Config, world_size: int) -> Iterator[Problem]:
    """Each length of the schedule is given in one unit."""
    settings = config.optimizer
    lengths = (
        (("iters", settings.lr_warmup_iters), ("samples", settings.lr_warmup_samples), "--lr-warmup"),
        (("iters", settings.lr_decay_iters), ("samples", settings.lr_decay_samples), "--lr-decay"),
        (("iters", settings.lr_wsd_decay_iters), ("samples", settings.lr_wsd_decay_samples), "--lr-wsd-decay"),
        (("fraction", settings.lr_warmup_fraction), ("samples", settings.lr_warmup_samples), "--lr-warmup"),
        (("fraction", settings.lr_warmup_fraction), ("iters", settings.lr_warmup_iters), "--lr-warmup"),
    )
    for (unit, length), (other_unit, other_length), flag in lengths:
        if length and other_length:
            flags = f"{flag}-{unit}", f"{flag}-{other_unit}"
            given = f"both {flags[0]} {length} and {flags[1]} {other_length} are given"
            yield Problem(flags, given, "", f"leave out {flags[0]}")


@rule(
    "optimizer.lr_decay_style",
    "optimizer.lr_wsd_decay_iters",
    "optimizer.lr_wsd_decay_samples",
    "optimizer.lr_warmup_iters",
    "optimizer.lr_warmup_samples",
    "optimizer.lr_warmup_fraction",
    "optimizer.lr_decay_iters",
    "optimizer.lr_decay_samples",
    "training.train_iters",
    "training.train_samples",
    *BATCH_SIZE_FIELDS,
)
def stable_learning_rate_decays_at_the_end(config: Config, world_size: int) -> Iterator[Problem]:
    """WSD says how long its decay is, and that fits between the warm-up and the end."""
    settings, sizes = config.optimizer, batch_sizes_or_none(config, world_size)
    if settings.lr_decay_style != "WSD" or sizes is None:
        return
    if settings.lr_wsd_decay_iters is None and settings.lr_wsd_decay_samples is None:
        yield Problem(
            ("--lr-decay-style", "--lr-wsd-decay-iters"),
            "WSD stays at the peak until its decay begins, and no length of the decay is given",
            "",
            "add --lr-wsd-decay-iters, a tenth of the run for example, or use --lr-decay-style cosine",
        )
        return
    warmup, end = learning_rate_warmup_samples(config, sizes), learning_rate_decay_samples(config, sizes)
    decay = wsd_decay_samples(config, sizes)
    steps = settings.lr_wsd_decay_iters
    most = end - warmup if steps is None else sizes.steps_within(end) - sizes.steps_within(int(warmup))
    given = decay if steps is None else steps
    if given > most:
        flag = "--lr-wsd-decay-samples" if steps is None else "--lr-wsd-decay-iters"
        yield Problem(
            (flag,),
            f"a decay of {given} does not fit between the warm-up and the end of the learning rate's schedule",
            f"{given} > {most:g}",
            f"use {flag} {int(most)} or less, or --lr-decay-style cosine",
        )


@rule("optimizer.lr_decay_style", "optimizer.decoupled_lr", "optimizer.decoupled_min_lr", "optimizer.min_lr")
def decoupled_rate_decays_downwards(config: Config, world_size: int) -> Iterator[Problem]:
    """The learning rate of word embedding and output layer has a peak, and decays from it downwards."""
    peak, minimum = config.optimizer.decoupled_lr, config.optimizer.decoupled_min_lr
    if peak is None and minimum is not None:
        yield Problem(
            ("--decoupled-min-lr", "--decoupled-lr"),
            "the word embedding has a lowest learning rate, but no peak",
            "",
            "add --decoupled-lr, or leave out --decoupled-min-lr",
        )
    lowest = config.optimizer.min_lr if minimum is None else minimum
    if peak is not None and lowest > peak:
        yield Problem(
            ("--decoupled-min-lr", "--decoupled-lr"),
            "the learning rate of the word embedding would decay upwards",
            f"{lowest} > {peak}",
            f"use --decoupled-min-lr {peak / 10:g}, or at most --decoupled-lr's {peak}",
        )


@rule("optimizer.weight_decay_incr_style", "optimizer.start_weight_decay", "optimizer.end_weight_decay")
def weight_decay_has_both_ends(config: Config, world_size: int) -> Iterator[Problem]:
    """Weight decay that changes has a start and an end; one that does not has neither."""
    settings = config.optimizer
    ends = {"--start-weight-decay": settings.start_weight_decay, "--end-weight-decay": settings.end_weight_decay}
    given = [flag for flag, value in ends.items() if value is not None]
    if settings.weight_decay_incr_style == "constant" and given:
        yield Problem(
            (*given, "--weight-decay-incr-style"),
            f"{' and '.join(given)} would change the weight decay, but it is constant",
            "",
            f"add --weight-decay-incr-style linear, or leave out {', '.join(given)}",
        )
    elif settings.weight_decay_incr_style != "constant" and len(given) < 2:
        missing = [flag for flag in ends if flag not in given]
        yield Problem(
            (*missing, "--weight-decay-incr-style"),
            f"weight decay is to change, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given",
            "",
            f"add {' '.join(f'{flag} 0.1' for flag in missing)}, or leave out --weight-decay-incr-style",
        )
