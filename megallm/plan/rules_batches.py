"""Rules about the size of the global batch, constant or changing."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.config.batch_sizes import BatchSizes, ramped, stepped
from megallm.config.report import counted
from megallm.config.resolve import resolved_batch_sizes, train_samples
from megallm.config.tree import Config
from megallm.plan.problem import Problem, divisors_near, multiples_near, rule

BATCH_SIZE_FIELDS = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "training.micro_batch_size",
    "training.global_batch_size",
    "data.seq_length",
)
"""What `batch_sizes_or_none` needs."""


def batch_sizes_or_none(config: Config, world_size: int) -> BatchSizes | None:
    """The batch sizes, or None where a rule of this file or of the layout tells why there are none."""
    try:
        return resolved_batch_sizes(config, world_size)
    except ValueError:
        return None


@rule("training.global_batch_size")
def ramp_up_leads_to_the_global_batch(config: Config, world_size: int) -> Iterator[Problem]:
    """`--rampup-batch-size` is three numbers, and whole increments lead to the global batch size."""
    training, flags = config.training, ("--rampup-batch-size", "--global-batch-size")
    if not training.rampup_batch_size:
        return
    if training.global_batch_size is None:
        yield Problem(flags, "a ramp is given, but not the size where it ends", "", "add --global-batch-size 1024")
        return
    try:
        ramped(training.rampup_batch_size, training.global_batch_size)
    except ValueError as error:
        yield Problem(
            flags,
            str(error),
            "",
            "write --rampup-batch-size START INCREMENT SAMPLES, where (global batch size - START) / INCREMENT is "
            "whole, as in --rampup-batch-size 16 16 1000000 --global-batch-size 1024",
        )


@rule("data.seq_length", "training.global_batch_size")
def stairs_of_batches_are_whole(config: Config, world_size: int) -> Iterator[Problem]:
    """`--step-batch-size-schedule` can be read, and its largest size is the global batch size."""
    training, flags = config.training, ("--step-batch-size-schedule", "--global-batch-size")
    if training.step_batch_size_schedule is None:
        return
    try:
        sizes = stepped(training.step_batch_size_schedule, config.data.seq_length)
    except ValueError as error:
        yield Problem(
            flags[:1],
            str(error),
            "",
            'write TOKENS:BATCH_SIZE, the first from 0 on, as in --step-batch-size-schedule "0:768 250B:1536"',
        )
        return
    if training.global_batch_size not in (None, sizes.largest):
        yield Problem(
            flags,
            f"the largest size of '{training.step_batch_size_schedule}' is not the global batch size",
            f"{sizes.largest} is not {training.global_batch_size}",
            f"leave out --global-batch-size, or use --global-batch-size {sizes.largest}",
        )


@rule()
def one_way_to_change_the_batch(config: Config, world_size: int) -> Iterator[Problem]:
    """A batch grows by a ramp or by stairs."""
    if config.training.rampup_batch_size and config.training.step_batch_size_schedule is not None:
        yield Problem(
            ("--rampup-batch-size", "--step-batch-size-schedule"),
            "both say how the batch size changes",
            "",
            "leave out --rampup-batch-size",
        )


@rule(*BATCH_SIZE_FIELDS)
def global_batch_divides(config: Config, world_size: int) -> Iterator[Problem]:
    """Each data parallel rank takes equally many whole micro-batches."""
    replicas = _data_parallel_size(config, world_size)
    batch, micro_batch = config.training.global_batch_size, config.training.micro_batch_size
    if batch is None or replicas is None or batch % (micro_batch * replicas) == 0:
        return
    ways = [f"use --global-batch-size {multiples_near(batch, micro_batch * replicas)}"]
    if batch % replicas == 0:
        ways.append(f"--micro-batch-size {divisors_near(batch // replicas, micro_batch)}")
    yield Problem(
        ("--global-batch-size", "--micro-batch-size"),
        f"a batch of {batch} sequences cannot be cut into micro-batches of {micro_batch} on each of "
        f"{counted(replicas, 'data parallel rank')}",
        f"{batch} % ({micro_batch} x {replicas}) = {batch % (micro_batch * replicas)}",
        ", or ".join(ways),
    )


@rule(*BATCH_SIZE_FIELDS, "training.train_iters", "training.train_samples")
def changing_batches_divide(config: Config, world_size: int) -> Iterator[Problem]:
    """The same for every size on the way to the global batch.

    A run that is resumed may be past the small ones: those still ahead are checked when its checkpoint is found.
    """
    training, replicas = config.training, _data_parallel_size(config, world_size)
    if not (training.rampup_batch_size or training.step_batch_size_schedule) or config.checkpoint.load:
        return
    sizes = batch_sizes_or_none(config, world_size)
    if sizes is None or replicas is None:
        return
    flag = "--rampup-batch-size" if training.rampup_batch_size else "--step-batch-size-schedule"
    group = training.micro_batch_size * replicas
    for size in sizes.sizes_within(train_samples(config, sizes)):
        if size % group and size != training.global_batch_size:
            yield Problem(
                (flag, "--micro-batch-size"),
                f"on the way there are batches of {size} sequences, which cannot be cut into micro-batches of "
                f"{training.micro_batch_size} on each of {counted(replicas, 'data parallel rank')}",
                f"{size} % ({training.micro_batch_size} x {replicas}) = {size % group}",
                f"use sizes and increments that {group} divides, or --micro-batch-size 1 with fewer processes",
            )
            return


def _data_parallel_size(config: Config, world_size: int) -> int | None:
    model_parallel = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    return None if world_size % model_parallel else world_size // model_parallel
