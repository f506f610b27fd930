"""Trains on a GPU that is not there: the engine's own steps, on tensors that have a device and a shape but no values.

torch refuses what mixes such a tensor with one on the CPU, and what would have to read its values, for which a real GPU
would have to be waited for. `python -m tests.unit.fake_gpu LIBRARY` does so for all `CASES` and says of each how it
ended, in a line, behind a tab. LIBRARY is fake_gpu.cpp, compiled.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

import megallm.train.engine
from megallm.ops.library import NATIVE
from megallm.pipeline.executor import PipelineExecutor
from megallm.train.step import evaluate_step, train_step
from tests.distributed.parity import GPT, LLAMA, Case, global_batch, make_engine, masked_batch, micro_batches
from tests.distributed.parity_cases import (
    BERT,
    CLIPPED,
    DROPOUT,
    FULL,
    IN_CHUNKS,
    OVERLAPPED,
    QK_NORM,
    SELECTIVE,
    SHARDED,
    TIED,
    TWO_STAGES,
)

SMALL = {"training.fp64": False, "training.global_batch_size": 4, "model.num_layers": 2}
NATIVE_ONLY = {"training.ops": ["native"]}
REFERENCE_ONLY = {"training.ops": ["reference"]}
BF16 = SMALL | {"training.bf16": True}
FP16 = SMALL | {"training.fp16": True}
MORE_IN_THE_LOG = {"logging.log_num_zeros_in_grad": True, "logging.log_params_norm": True}

CASES = [
    Case("llama, bf16, native", LLAMA | BF16 | NATIVE_ONLY | MORE_IN_THE_LOG),
    Case(
        "llama, bf16, native, all axes",
        LLAMA | QK_NORM | BF16 | NATIVE_ONLY | CLIPPED | {"model.num_layers": 4},
        tp=2,
        pp=2,
        dp=2,
        layout=TWO_STAGES | OVERLAPPED | SELECTIVE,
    ),
    Case("gpt, fp16, native, tensor and data", GPT | TIED | FP16 | NATIVE_ONLY | DROPOUT, tp=2, dp=2, layout=FULL),
    Case("bert, bf16, native, pipeline", BERT | BF16 | NATIVE_ONLY | DROPOUT, pp=2, kind="bert"),
    Case("gpt, float32, plain torch, tensor", GPT | SMALL | REFERENCE_ONLY | DROPOUT, tp=2, layout=IN_CHUNKS),
    Case("llama, bf16, plain torch, sharded", LLAMA | BF16 | REFERENCE_ONLY, dp=2, layout=SHARDED),
]


MISTAKES: dict[str, Callable[[torch.Tensor], object]] = {
    "mixes devices": lambda on_gpu: on_gpu + torch.ones(2),
    "reads a value": lambda on_gpu: on_gpu.sum().item(),
    "copies to the host": lambda on_gpu: on_gpu.cpu(),
    "gives an operator something else": lambda on_gpu: torch.ops.megallm.sum_of_squares([on_gpu, torch.ones(2)]),
}


class FakeGPU(FakeTensorMode):
    """Tensors made on a GPU within this have no values. Their backward pass needs fake_gpu.cpp."""

    # torch would ask whether a GPU is there, and below it is told so.
    avoid_device_init = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = MappingProxyType({})) -> object:
        given = devices_of((args, kwargs))
        # torch does not compare the devices of what our own operators are given, whose kernels read all of it.
        assert func.namespace != "megallm" or len(given) == 1, f"{func} was given tensors on {sorted(given)}"
        results = super().__torch_dispatch__(func, types, args, kwargs)
        assert not ("cuda:0" in given and "cpu" in devices_of(results)), f"{func} waits for what it copies to the host"
        return results


def devices_of(values: object) -> set[str]:
    return {str(value.device) for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


class FakeEvent:
    """In place of torch.cuda.Event, which a torch without CUDA does not have."""

    def __init__(self, **settings: bool) -> None: ...

    def record(self) -> None: ...


def pretend() -> None:
    """What the project asks the driver is answered as on a machine with one GPU, an H100.

    What it compares between ranks before the first step, when a GPU may be waited for, is left out.
    """
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.Event = FakeEvent  # type: ignore[misc, assignment]
    megallm.train.engine.on_every_rank = lambda mesh, function: function()
    PipelineExecutor._check_messages_agree = lambda executor: None  # type: ignore[method-assign]
    if NATIVE.loaded:
        object.__setattr__(NATIVE, "cuda_architectures", ("9.0",))
        object.__setattr__(NATIVE, "on_cuda", NATIVE.on_cpu)


def run(case: Case, rank: int) -> None:
    """Two steps and an evaluation on one rank, whose messages nobody answers."""
    with FakeGPU():
        engine = make_engine(rank, case)
        config = engine.config
        assert config.model.vocab_size and config.training.global_batch_size
        sizes = config.training.global_batch_size, config.data.seq_length, config.model.vocab_size
        batch = masked_batch(0, *sizes) if case.kind == "bert" else global_batch(0, *sizes, case.mask)
        parts = micro_batches(engine, batch)
        for _ in range(2):
            metrics = train_step(engine, parts)
        for name, value in (vars(metrics) | metrics.more).items():
            if isinstance(value, torch.Tensor):
                assert value.is_cuda, f"{name} of the step is on the CPU"
        evaluate_step(engine, parts)


def outcome(function: Callable[[], object]) -> str:
    """How it ended: "ok", or what was raised, in a line, and where in the project."""
    try:
        function()
    except Exception as error:
        frames, trace = [], error.__traceback__
        while trace is not None:
            if "/megallm/" in trace.tb_frame.f_code.co_filename:
                frames.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
            trace = trace.tb_next
        return f"{type(error).__name__} {' '.join(str(error).split())[:300]} in {frames[-1] if frames else 'the test'}"
    return "ok"


def in_fake_mode(mistake: Callable[[torch.Tensor], object]) -> None:
    with FakeGPU():
        mistake(torch.ones(2, device="cuda"))


def in_a_job(case: Case, rank: int) -> None:
    if case.world_size > 1:
        dist.init_process_group("fake", rank=rank, world_size=case.world_size, store=FakeStore())
    try:
        run(case, rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    pretend()
    for name, mistake in MISTAKES.items():
        print(f"{name}\t{outcome(lambda m=mistake: in_fake_mode(m))}")
    for case in CASES:
        on_gpu = Case(**vars(case) | {"device": "cuda"})
        # Only stages of the pipeline differ in what they do.
        for rank in (0, case.world_size - 1) if case.pp > 1 else (0,):
            print(f"{case.name}, rank {rank}\t{outcome(lambda c=on_gpu, r=rank: in_a_job(c, r))}", flush=True)


if __name__ == "__main__":
    main()
