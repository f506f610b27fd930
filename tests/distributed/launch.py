"""Starts the programs as a person does, in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pretrain_gpt

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# A run of six steps on synthetic data that takes no time.
TINY = [
    "--mock-data",
    *("--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "51"),
    *("--num-layers", "4"),
    *("--hidden-size", "32"),
    *("--num-attention-heads", "4"),
    *("--seq-length", "16"),
    *("--micro-batch-size", "1"),
    *("--global-batch-size", "4"),
    *("--train-iters", "6"),
    *("--lr", "1e-2"),
    *("--lr-warmup-iters", "2"),
    *("--lr-decay-style", "cosine"),
    *("--hidden-dropout", "0.1"),
    *("--log-interval", "2"),
    "--fp64",
    *("--device", "cpu"),
    *("--eval-interval", "3"),
    *("--eval-iters", "2"),
]


@dataclass(frozen=True)
class Ended:
    """A program that came to its end."""

    code: int
    output: str
    errors: str


COMPARED = "measured_memory_bytes"


def without(flags: list[str], *names: str) -> list[str]:
    """Flags without those named and their values."""
    kept: list[str] = []
    leaving_out = False
    for word in flags:
        if word.startswith("--"):
            leaving_out = word in names
        if not leaving_out:
            kept.append(word)
    return kept


def run(command: list[str], timeout: float = 300.0) -> Ended:
    """Runs a command in the checkout's root, with one thread, outside of any launcher."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    return Ended(done.returncode, done.stdout, done.stderr)


def python(script: str, *arguments: str, timeout: float = 300.0) -> Ended:
    return run([sys.executable, script, *arguments], timeout)


def program_here(
    capsys: pytest.CaptureFixture[str], *arguments: str, main: Callable[[list[str]], object] = pretrain_gpt.main
) -> Ended:
    """A program, by default that for GPT, in this process, which has loaded everything that it needs."""
    capsys.readouterr()
    code: object = 0
    try:
        main(list(arguments))
    except SystemExit as left:
        code = left.code
    output, errors = capsys.readouterr()
    assert isinstance(code, int), f"it ends with {code}"
    return Ended(code, output, errors)


def torchrun(num_processes: int, script: str, *arguments: str, timeout: float = 300.0) -> Ended:
    """One machine."""
    return run([*TORCHRUN, "--standalone", "--nproc-per-node", str(num_processes), script, *arguments], timeout)


def two_machines(num_processes: int, script: str, *arguments: str, timeout: float = 300.0) -> list[Ended]:
    """Two launchers that find each other through a port of this machine, as those of two machines do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *TORCHRUN,
        *("--nnodes", "2", "--nproc-per-node", str(num_processes), "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"),
        *(script, *arguments),
    ]
    ended: list[Ended] = []
    machines = [threading.Thread(target=lambda: ended.append(run(command, timeout))) for _ in range(2)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    return ended


def succeeded(ended: Ended) -> Ended:
    assert ended.code == 0, ended.output + ended.errors
    return ended


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def series(file: Path) -> list[dict[str, Any]]:
    """The steps and evaluations of a run, without what compares them with the plan."""
    return [line for line in read_lines(file) if COMPARED not in line]


def training_lines(file: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(file) if "lm_loss" in line]


def validation_lines(file: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(file) if "valid_lm_loss" in line]
