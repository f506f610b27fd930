"""The engine on a GPU: one process trains, and its losses are those of the CPU."""

from __future__ import annotations

import pytest
import torch

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.mesh import Mesh, MeshShape
from megallm.ops.library import NATIVE
from megallm.train.engine import build_engine
from megallm.train.step import train_step
from megallm.train.tasks.gpt import GPTTask
from tests.distributed.parity import GPT, LLAMA, Case, global_batch, micro_batches
from tests.distributed.parity_cases import DROPOUT, IN_CHUNKS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_the_operators_are_built_for_this_gpu():
    assert NATIVE.in_use, NATIVE.reason
    assert NATIVE.covers(torch.cuda.get_device_capability()), NATIVE.cuda_architectures


def losses(case: Case, device: str, num_steps: int = 5, **settings: bool) -> list[float]:
    # A power of two: on a GPU the learning rate is rounded to float32.
    values = (
        case.settings() | {"optimizer.lr": 2.0**-10} | {f"training.{name}": value for name, value in settings.items()}
    )
    config = resolve(build(values), 1)
    assert config.model.vocab_size
    engine = build_engine(config, GPTTask.from_config(config), Mesh(MeshShape(), 0, torch.device(device)))
    found = []
    for step in range(num_steps):
        batch = global_batch(step, 8, config.data.seq_length, config.model.vocab_size, case.mask)
        found.append(float(train_step(engine, micro_batches(engine, batch)).losses[0]))
    return found


@pytest.mark.parametrize(
    "features", [LLAMA, GPT | DROPOUT, LLAMA | IN_CHUNKS], ids=["llama", "gpt with dropout", "loss in chunks"]
)
def test_losses_equal_those_of_the_cpu(features):
    case = Case("one GPU", features, mask="ragged")
    assert losses(case, "cuda") == pytest.approx(losses(case, "cpu"), rel=1e-10)


@pytest.mark.parametrize("features", [LLAMA, GPT | DROPOUT], ids=["llama", "gpt with dropout"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_train(precision, features):
    case = Case("one GPU", features | {"training.initial_loss_scale": 2.0**20})
    found = losses(case, "cuda", num_steps=20, fp64=False, **{precision: True})
    assert found[-1] < found[0]


@pytest.mark.parametrize("features", [LLAMA, LLAMA | IN_CHUNKS], ids=["", "loss in chunks"])
@pytest.mark.parametrize("precision", ["fp64", "bf16", "fp16"])
def test_a_step_waits_for_nothing(precision, features):
    settings = Case("one GPU", features).settings() | {"training.fp64": False, f"training.{precision}": True}
    config = resolve(build(settings), 1)
    assert config.model.vocab_size
    engine = build_engine(config, GPTTask.from_config(config), Mesh(MeshShape(), 0, torch.device("cuda")))
    parts = micro_batches(engine, global_batch(0, 8, 16, config.model.vocab_size, "full"))
    train_step(engine, parts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(engine, parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
