"""What runs with --device cuda, on a GPU that is the host: the same losses as on a CPU, and no cause to wait."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megallm.ops.library import NATIVE
from tests.host_gpu.device import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="a function of torch's is replaced as Linux does it"),
    pytest.mark.skipif(torch.cuda._is_compiled(), reason="this torch has CUDA, and tests/gpu is for it"),
    pytest.mark.skipif(not NATIVE.loaded, reason=f"native operators: {NATIVE.reason}"),
]
ROOT = Path(__file__).parents[2]
PRETRAIN = shlex.split(
    "pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu "
    "--disable-bias-linear --mock-data --tokenizer-type NullTokenizer --vocab-size 512 --micro-batch-size 2 "
    "--global-batch-size 8 --train-iters 8 --lr 1e-3 --log-interval 1 --eval-interval 4 --eval-iters 1 "
    "--use-distributed-optimizer"
)


def run(*command: object) -> str:
    ended = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


def losses(log: str) -> list[float]:
    """Of each step and evaluation in a log."""
    return [float(loss) for loss in re.findall(r"lm loss(?: value)?: (\S+)", log)]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("host_gpu"))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> tuple[Path, list[float]]:
    """Folder of checkpoints and losses of a run on the CPU."""
    folder = tmp_path_factory.mktemp("on_cpu")
    return folder, losses(run(sys.executable, *PRETRAIN, "--device", "cpu", "--save", folder, "--save-interval", 4))


def test_tests_for_a_gpu_pass(library):
    inside = "tests/host_gpu/inside.py"
    engine = [
        f"tests/gpu/test_engine.py::test_{name}" for name in ("losses_equal_those_of_the_cpu", "sixteen_bits_train")
    ]
    waits = "tests/gpu/test_engine.py::test_a_step_waits_for_nothing"
    summary = run(
        *(sys.executable, "-m", "tests.host_gpu.device", library),
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", inside, *engine, waits),
    ).splitlines()[-1]
    assert re.fullmatch(r"\d+ passed in .*", summary)


def test_a_run_of_the_cpu_continues_on_the_gpu(library, on_cpu, tmp_path):
    checkpoints, expected = on_cpu
    assert len(expected) == 10
    log = run(
        *(sys.executable, "-m", "tests.host_gpu.device", library, *PRETRAIN, "--device", "cuda"),
        *("--load", checkpoints, "--ckpt-step", 4, "--save", tmp_path, "--save-interval", 4, "--async-save"),
    )
    # The evaluation after step 4 came before the checkpoint.
    assert losses(log) == pytest.approx(expected[5:], rel=2e-6)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "8"


def test_processes_that_share_a_gpu_train_as_one_on_the_cpu(library, on_cpu):
    log = run(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 4, "-m", "tests.host_gpu.device", library),
        *(*PRETRAIN, "--device", "cuda", "--sequence-parallel"),
        *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
        *("--overlap-grad-reduce", "--overlap-param-gather"),
    )
    assert losses(log) == pytest.approx(on_cpu[1], rel=2e-6)
