"""Rules about the layout: processes, batches, and the switches that need each other."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.config.report import counted
from megallm.config.tree import Config
from megallm.plan.problem import Problem, divisors_near, multiples_near, rule


@rule("parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size")
def layout_divides_world(config: Config, world_size: int) -> Iterator[Problem]:
    """The processes make whole copies of the model."""
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    model_parallel = tensor * pipeline
    if world_size % model_parallel == 0:
        return
    ways = [f"start {multiples_near(world_size, model_parallel)} processes"]
    if world_size % pipeline == 0:
        ways.append(f"use --tensor-model-parallel-size {divisors_near(world_size // pipeline, tensor)}")
    if world_size % tensor == 0:
        ways.append(f"use --pipeline-model-parallel-size {divisors_near(world_size // tensor, pipeline)}")
    yield Problem(
        ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"),
        f"{counted(world_size, 'process does', 'processes do')} not make whole copies of a model that takes "
        f"{model_parallel}",
        f"{world_size} % ({tensor} x {pipeline}) = {world_size % model_parallel}",
        ", or ".join(ways),
    )


@rule("data.seq_length", "parallel.tensor_model_parallel_size")
def tensor_size_divides_sequence(config: Config, world_size: int) -> Iterator[Problem]:
    """Under sequence parallelism each tensor rank holds an equal piece of the sequence."""
    length, tensor = config.data.seq_length, config.parallel.tensor_model_parallel_size
    if config.parallel.sequence_parallel and length % tensor:
        yield Problem(
            ("--seq-length", "--tensor-model-parallel-size"),
            f"sequences of {length} tokens cannot be cut over {tensor} tensor ranks, as sequence parallelism does",
            f"{length} % {tensor} = {length % tensor}",
            f"use --seq-length {multiples_near(length, tensor)}, or --no-sequence-parallel",
        )


@rule()
def param_gather_overlap_needs_distributed_optimizer(config: Config, world_size: int) -> Iterator[Problem]:
    """Without the distributed optimizer there is nothing to gather."""
    if config.parallel.overlap_param_gather and not config.parallel.use_distributed_optimizer:
        yield Problem(
            ("--overlap-param-gather", "--use-distributed-optimizer"),
            "parameters are gathered only where the optimizer is distributed",
            "",
            "add --use-distributed-optimizer, or leave out --overlap-param-gather",
        )


@rule("parallel.distributed_backend", "training.device")
def backend_runs_on_device(config: Config, world_size: int) -> Iterator[Problem]:
    """NCCL moves memory of GPUs only."""
    if config.parallel.distributed_backend == "nccl" and config.training.device == "cpu":
        yield Problem(
            ("--distributed-backend", "--device"),
            "nccl does not run on a CPU",
            "",
            "use --distributed-backend gloo, or --device cuda",
        )
