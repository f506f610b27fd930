"""The whole of Llama-2-7B on one GPU: bfloat16, AdamW, float32 master weights and gradients, 8 micro-batches a step.

    python benchmarks/train_7b.py [--device cuda] [--steps 20] [--micro-batch-size 1] [--output FILE]

Prints tokens per second, the operations of the model per second and their share of the GPU's stated peak (MFU) with
causal attention counted half and in full, and the memory that torch gave out; beside them what the plan of the same run
predicts, by the GPU's stated rates and by rates that are measured first. Tokens are random: the speed does not depend
on them. Where memory does not suffice, more and more is computed again in the backward pass, and the results say so.

On a CPU a small model proves that the program runs; its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llama import SIZES, configuration, describe, known_gpu, rates, size_for
from record import machine, write

from megallm.config import Config
from megallm.device import Stopwatch, memory_in_bytes, select_device
from megallm.mesh import Mesh, MeshShape
from megallm.plan.flops import flops_per_token
from megallm.plan.gpus import Gpu
from megallm.plan.plan import make_plan
from megallm.plan.stages import Layout
from megallm.train.calibration import measured_rates
from megallm.train.engine import Engine, build_engine
from megallm.train.step import train_step
from megallm.train.tasks.gpt import GPTTask

WARM_UP = 3
# What is computed again, from nothing on.
RECOMPUTED: tuple[dict[str, Any], ...] = (
    {},
    {"loss_chunk_size": 1024},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "full"},
)


def micro_batches(config: Config, step: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Those of a step, on the device."""
    size, length, words = config.training.micro_batch_size, config.data.seq_length, config.model.vocab_size
    assert words and config.training.global_batch_size, "the configuration is resolved"
    generator = torch.Generator().manual_seed(step)
    found = []
    for first in range(0, config.training.global_batch_size, size):
        text = torch.randint(0, words, (size, length + 1), generator=generator).to(device)
        found.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": torch.ones(size, length, device=device),
                "position_ids": torch.arange(length, device=device).expand(size, length).contiguous(),
                "sample_ids": torch.arange(first, first + size, device=device),
            }
        )
    return found


def train(engine: Engine, num_steps: int) -> dict[str, Any]:
    """Takes `num_steps` steps after some to warm up; seconds of each, and the losses of the first and the last."""
    device = engine.mesh.device
    losses = []
    stopwatch = Stopwatch(device)
    batches = [micro_batches(engine.config, step, device) for step in range(WARM_UP + num_steps)]
    for step, batch in enumerate(batches):
        if step == WARM_UP:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            stopwatch = Stopwatch(device)
        with stopwatch.measure(step):
            losses.append(train_step(engine, batch).losses)
    spans = stopwatch.spans()
    times = [end - begin for _, begin, end in spans]
    return {
        "steps": num_steps,
        "seconds_per_step": round((spans[-1][2] - spans[0][1]) / num_steps, 5),
        "seconds_of_a_step": {"median": round(statistics.median(times), 5), "max": round(max(times), 5)},
        "losses": [round(float(losses[0]), 4), round(float(losses[-1]), 4)],
        "memory": memory_in_bytes(device),
    }


def predictions(engine: Engine, gpu: Gpu | None, measured: Gpu) -> dict[str, dict[str, float]]:
    """Seconds of a step and bytes, by the plan."""
    layout = Layout(engine.config, 1, engine.mesh.device.type == "cuda")
    plans = {"by measured rates": make_plan(layout, measured)}
    if gpu is not None:
        plans["by stated rates"] = make_plan(layout, gpu)
    return {
        name: {
            "seconds_per_step": round(plan.step.total, 5),
            "tokens_per_second": round(plan.tokens / plan.step.total, 1),
            "allocated_bytes": plan.peak - plan.memory[0]["communicators"],
        }
        for name, plan in plans.items()
    }


def measure(config: Config, device: torch.device, num_steps: int) -> dict[str, Any]:
    mesh = Mesh(MeshShape(), 0, device)
    model = config.model
    assert model.ffn_hidden_size, "the configuration is resolved"
    tokens = config.data.seq_length * config.training.micro_batch_size
    reached = measured_rates(mesh, torch.bfloat16, tokens, model.hidden_size, model.ffn_hidden_size)
    begin = time.perf_counter()
    engine = build_engine(config, GPTTask.from_config(config), mesh)
    building = time.perf_counter() - begin
    gpu = known_gpu(device)
    found = train(engine, num_steps)
    tokens *= engine.num_micro_batches
    return {
        "micro_batch_size": config.training.micro_batch_size,
        "num_micro_batches": engine.num_micro_batches,
        "tokens_per_step": tokens,
        "seconds_to_build": round(building, 2),
        **rates(flops_per_token(model, config.data.seq_length), tokens, found["seconds_per_step"], gpu),
        **found,
        "predicted": predictions(engine, gpu, reached),
    }


def measure_what_fits(arguments: argparse.Namespace, size: str, device: torch.device) -> dict[str, Any]:
    """The first of RECOMPUTED for which memory suffices."""
    for number, again in enumerate(RECOMPUTED):
        config = configuration(size, arguments.micro_batch_size, arguments.accumulation, **again)
        try:
            return {"recomputed": again, **measure(config, device, arguments.steps)}
        except torch.OutOfMemoryError as error:
            if number == len(RECOMPUTED) - 1:
                raise
            print(f"with {again or 'nothing'} computed again: {str(error).splitlines()[0]}", flush=True)
        # Out of the handler, whose error holds on to what the step had made.
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("the last attempt returns or raises")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--size", choices=list(SIZES), help="default: 7b on a GPU, small on a CPU")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=20, help="measured steps, after some to warm up")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(words)
    device = select_device(arguments.device)
    size = arguments.size or size_for(device)
    record = measure_what_fits(arguments, size, device)
    print(
        f"{size}, {record['tokens_per_step']} tokens a step in {record['seconds_per_step']:.3f} s: {describe(record)}"
    )
    print("memory: " + ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in record["memory"].items()))
    for name, plan in record["predicted"].items():
        print(
            f"predicted {name}: {plan['seconds_per_step']:.3f} s a step, {plan['tokens_per_second']:.0f} tokens/s, "
            f"{plan['allocated_bytes'] / 2**30:.2f} GiB"
        )
    if arguments.output:
        gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        write(arguments.output, {"machine": machine("torch"), **gpu, "size": size, **record})


if __name__ == "__main__":
    main()
