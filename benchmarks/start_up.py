"""How long a person waits: from the start of a process to the log line of its first step, to the help, to a plan.

    python benchmarks/start_up.py [--repetitions 5] [--output [FILE]]

What is timed, on the clock, in processes of their own with one thread each: a GPT of the demo's size and a BERT of that
size on mock data, until the log tells of the first step; and, until they end, `--help`, a dry run of the same GPT in
eight processes, and two of the slowest there are: models of half a trillion parameters in 80 stages, and of 800 billion
in 256, on 16,384 GPUs. They take turns; the median of the repetitions stands, with their range beside it. Files are in
the system's memory from a first round, which does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from record import RESULTS, machine, write

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = RESULTS / "start_up.json"

SIZE = "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --vocab-size 8192"
DATA = "--mock-data --tokenizer-type NullTokenizer"
TRAINING = "--micro-batch-size 4 --global-batch-size 32 --lr 1e-3 --train-iters 1 --log-interval 1"
BERT = f"{SIZE} {DATA} {TRAINING}"
GPT = f"{BERT} --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
HUGE = (
    f"{DATA} --hidden-size 16384 --num-attention-heads 128 --seq-length 4096 --vocab-size 128256 --bf16 --lr 1e-4 "
    "--position-embedding-type rope --normalization RMSNorm --use-distributed-optimizer --tensor-model-parallel-size 8 "
    "--micro-batch-size 1 --global-batch-size 8192 --train-iters 10 --dry-run --world-size 16384"
)
STAGES = "--pipeline-model-parallel-size {} --num-virtual-stages-per-pipeline-rank {}"
FIRST_STEP = "] iteration "


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and what its output says when the waiting is over; None: when it ends."""

    program: str
    arguments: str
    awaited: str | None = None


COMMANDS = {
    "first step of a GPT": Command("pretrain_gpt.py", GPT, FIRST_STEP),
    "first step of a BERT": Command("pretrain_bert.py", BERT, FIRST_STEP),
    "help": Command("pretrain_gpt.py", "--help"),
    "dry run": Command("pretrain_gpt.py", f"{GPT} --dry-run --world-size 8 --tensor-model-parallel-size 2"),
    "dry run, 80 stages": Command("pretrain_gpt.py", f"{HUGE} --num-layers 160 {STAGES.format(16, 5)}"),
    "dry run, 256 stages": Command("pretrain_gpt.py", f"{HUGE} --num-layers 256 {STAGES.format(128, 2)}"),
}


def seconds(command: Command) -> float:
    """Until what is awaited was said, or else until the end. Raises RuntimeError where the program fails."""
    arguments = [sys.executable, str(REPOSITORY / command.program), *command.arguments.split()]
    begin = time.perf_counter()
    said: list[str] = []
    waited: float | None = None
    with subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if waited is None and command.awaited is not None and command.awaited in line:
                waited = time.perf_counter() - begin
    if waited is None and command.awaited is None:
        waited = time.perf_counter() - begin
    if process.returncode != 0 or waited is None:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{''.join(said)}")
    return waited


def measure(repetitions: int) -> dict[str, dict[str, float]]:
    """Seconds of each command: median, least and most."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repetition in range(repetitions + 1):
        for name, command in COMMANDS.items():
            found = seconds(command)
            if repetition > 0:
                times[name].append(found)
    return {
        name: {
            "median": round(statistics.median(found), 2),
            "least": round(min(found), 2),
            "most": round(max(found), 2),
        }
        for name, found in times.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repetitions", type=int, default=5, help="(5)")
    parser.add_argument("--output", nargs="?", const=DEFAULT_OUTPUT, type=Path, help=f"default {DEFAULT_OUTPUT}")
    options = parser.parse_args(arguments)
    report = {"machine": machine("torch"), "repetitions": options.repetitions, "seconds": measure(options.repetitions)}
    print(json.dumps(report, indent=2))
    if options.output:
        write(options.output, report)


if __name__ == "__main__":
    main()
