"""What is true on the GPU that is the host: it refuses what a real one refuses, and the engine gives it no cause.

Runs there only, called by test_host_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

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


@pytest.fixture
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_tensors_of_two_devices_are_refused():
    on_gpu = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        on_gpu + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ops.megallm.sum_of_squares([on_gpu, torch.ones(2)])


@pytest.mark.parametrize(
    "wait",
    [
        lambda on_gpu: on_gpu.sum().item(),
        lambda on_gpu: on_gpu.cpu(),
        lambda on_gpu: torch.tensor([1.0], device="cuda"),
        lambda on_gpu: on_gpu[on_gpu > 0],
        lambda on_gpu: on_gpu[torch.tensor([0])],
    ],
    ids=["value", "copy to the host", "copy from the host", "as many as are true", "index on the host"],
)
def test_waiting_is_seen(wait, waiting_is_an_error):
    with pytest.raises(RuntimeError, match="synchronizing"):
        wait(torch.ones(2, device="cuda"))


def test_tensors_are_those_of_any_device():
    base = torch.zeros(3, 4, device="cuda")
    base[1:].t()[2].add_(1.0)
    assert base.tolist() == [[0.0] * 4, [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    assert torch.empty(2, pin_memory=True).is_pinned() and not torch.empty(2).is_pinned()
    weight = torch.randn(3, 3, device="cuda", requires_grad=True)
    (weight @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.is_cuda


SMALL = {"training.fp64": False, "training.global_batch_size": 4, "model.num_layers": 2}
NATIVE = {"training.ops": ["native"]}
REFERENCE = {"training.ops": ["reference"]}
BF16 = SMALL | {"training.bf16": True}
FP16 = SMALL | {"training.fp16": True}
MORE_IN_THE_LOG = {"logging.log_num_zeros_in_grad": True, "logging.log_params_norm": True}
ALL_AXES = TWO_STAGES | OVERLAPPED | SELECTIVE
CASES = [
    Case("llama, bf16", LLAMA | BF16 | NATIVE | MORE_IN_THE_LOG),
    Case(
        "llama, bf16, all axes", LLAMA | QK_NORM | BF16 | NATIVE | CLIPPED | {"model.num_layers": 4}, 2, 2, 2, ALL_AXES
    ),
    Case("gpt, fp16, tensor and data", GPT | TIED | FP16 | NATIVE | DROPOUT, tp=2, dp=2, layout=FULL),
    Case("bert, bf16, pipeline", BERT | BF16 | NATIVE | DROPOUT, pp=2, kind="bert"),
    Case("gpt, float32, plain torch, tensor", GPT | SMALL | REFERENCE | DROPOUT, tp=2, layout=IN_CHUNKS),
    Case("llama, bf16, plain torch, sharded", LLAMA | BF16 | REFERENCE, dp=2, layout=SHARDED),
]


# Only stages of the pipeline differ in what their ranks do.
@pytest.mark.parametrize(
    ("case", "rank"),
    [(case, rank) for case in CASES for rank in ((0, case.world_size - 1) if case.pp > 1 else (0,))],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_steps_of_one_rank_stay_on_the_gpu_and_wait_for_nothing(case, rank, monkeypatch):
    """Its messages, which nobody answers, go from the GPU to the GPU as with NCCL, not by way of the host."""
    # Compared before the first step, when a GPU may be waited for.
    monkeypatch.setattr(PipelineExecutor, "_check_messages_agree", lambda executor: None)
    dist.init_process_group("fake", rank=rank, world_size=case.world_size, store=FakeStore())
    try:
        engine = make_engine(rank, Case(**vars(case) | {"device": "cuda"}))
        config = engine.config
        assert config.model.vocab_size and config.training.global_batch_size
        sizes = config.training.global_batch_size, config.data.seq_length, config.model.vocab_size
        batch = masked_batch(0, *sizes) if case.kind == "bert" else global_batch(0, *sizes, case.mask)
        parts = micro_batches(engine, batch)
        train_step(engine, parts)
        torch.cuda.set_sync_debug_mode("error")
        metrics = train_step(engine, parts)
        evaluate_step(engine, parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
    scalars = {name: value for name, value in vars(metrics).items() if isinstance(value, torch.Tensor)}
    assert all(value.is_cuda for value in (scalars | metrics.more).values())
