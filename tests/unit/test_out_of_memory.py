"""Want of memory ends a run with what was predicted, what takes most, and changes that fit."""

from __future__ import annotations

import os
import re

import pytest
import torch

import pretrain_gpt
from megallm.config import parse_arguments, resolve
from megallm.plan.gpus import DEFAULT_GPU, GPUS
from megallm.plan.plan import make_plan
from megallm.plan.stages import Layout
from megallm.train import loop

RUN = """--mock-data --tokenizer-type NullTokenizer --vocab-size 100 --num-layers 2 --hidden-size 64
    --num-attention-heads 4 --seq-length 64 --lr 1e-3 --train-iters 3 --micro-batch-size 4 --global-batch-size 8 --bf16
    --device cpu""".split()  # noqa: SIM905 (a command line)


def test_the_message_tells_what_would_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps = []

    def step_without_memory(*arguments: object) -> object:
        steps.append(arguments)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return train_step(*arguments)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", step_without_memory)
    with pytest.raises(SystemExit) as left:
        pretrain_gpt.main(RUN)
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert "rank 0: CUDA out of memory. Tried to allocate 2.00 GiB." in message
    assert "has ..." not in message
    config = resolve(parse_arguments(RUN, prog="", description=""), 1)
    kinds = make_plan(Layout(config, 1, on_gpu=False), GPUS[DEFAULT_GPU]).memory[0]
    assert f"predicted for this rank: {sum(kinds.values()) / 2**20:.2f} MiB of " in message
    assert "; the largest kinds are activations" in message
    lines = message.split("what would fit:\n")[1].splitlines()
    assert len(lines) == 3
    for line in lines:
        found = re.fullmatch(r"  (--\S+ .*?)  +(\S+) MiB  +\S+ x the time", line)
        assert found, line
        # What is proposed needs clearly less, by a plan of its own.
        changed = resolve(parse_arguments([*RUN, *found[1].split()], prog="", description=""), 1)
        plan = make_plan(Layout(changed, 1, on_gpu=False), GPUS[DEFAULT_GPU])
        assert plan.peak / 2**20 == pytest.approx(float(found[2]), abs=0.01)
        assert plan.peak <= 0.9 * sum(kinds.values())


def test_what_a_cpu_lacks_is_explained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    with pytest.raises(
        ValueError, match=r"^rank 0: DefaultCPUAllocator: can't allocate memory: .*\npredicted for this"
    ):
        pretrain_gpt_with(RuntimeError(lacking))
    # What fits has to fit the machine.
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2}[name])
    with pytest.raises(ValueError, match=r"(?s) of 0\.01 MiB; .*no one or two changes"):
        pretrain_gpt_with(RuntimeError(lacking))


def test_processes_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 MiB are enough for each of the changes, a 64th of them for none.
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**14}[name])
    lacking = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
    with pytest.raises(ValueError, match=r"(?s) of 64\.00 MiB; .*what would fit:\n  --"):
        pretrain_gpt_with(lacking)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    share = r"(?s) of 1\.00 MiB, its share of the 64\.00 MiB that 64 processes have on this machine; .*no one or two"
    with pytest.raises(ValueError, match=share):
        pretrain_gpt_with(lacking)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"):
        pretrain_gpt_with(RuntimeError("something else"))


def pretrain_gpt_with(error: Exception) -> None:
    from megallm.mesh import Mesh, MeshShape
    from megallm.train.out_of_memory import out_of_memory_explained

    config = resolve(parse_arguments(RUN, prog="", description=""), 1)
    with out_of_memory_explained(config, Mesh(MeshShape(), 0, torch.device("cpu"))):
        raise error
