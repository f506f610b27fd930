"""One layer of Llama-2-7B, forward and backward in bfloat16, against what its device could do at most.

    python benchmarks/layer.py [--device cuda] [--micro-batches 1 2 4] [--output FILE]

Gradients of weights are added to float32 buckets, as in training. The table says milliseconds; the operations of the
model per second and their share of the GPU's stated peak (MFU), with causal attention counted half and in full; and
what goes to matrix products, to attention, to other operators, and on a GPU to waiting for the host. Beside
it stands a roofline from rates that are measured in the same process: the layer's products, and attention as a fused
kernel computes it (its backward pass 2.5 times the forward), at the rate of the products alone, and every other
operator at the rate of a copy, with the bytes that it must move if it is fused.

On a CPU a small layer proves that the program runs; its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llama import SIZES, configuration, describe, known_gpu, rates, size_for
from record import machine, write
from torch.profiler import ProfilerActivity, profile

from megallm.config import Config
from megallm.config.operators import OperatorChoices
from megallm.data_parallel.reducer import GradientReducer
from megallm.device import Stopwatch, select_device
from megallm.layers.context import LayoutContext
from megallm.mesh import Mesh, MeshShape
from megallm.model.gpt import GPTStage
from megallm.plan.flops import ModelFlops, flops_per_token, head_flops_per_token
from megallm.plan.gpus import Gpu
from megallm.train.calibration import measured_rates

WARM_UP = 5
PROFILED = 3
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "aten::_addmm_activation")
ATTENTION = ("attention", "flash", "cudnn", "efficient")


class Layer:
    """A layer with what it needs to run as in the midst of a stage: its first norm adds what the layer before leaves to
    be added, and what it leaves itself is the affair of the one after it.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.mesh = Mesh(MeshShape(), 0, device)
        context = LayoutContext(self.mesh.tp, False, torch.bfloat16, device, seed=1)
        self.stage = GPTStage(config, range(1), context, is_first=False, is_last=False)
        self.stage.initialize()
        self.reducer = GradientReducer(
            {0: self.stage},
            self.mesh,
            context.weight_gradients,
            bucket_elements=10**9,
            sharded=False,
            overlap=False,
            operators=OperatorChoices(),
        )
        self.reducer.start_step(10**9)  # zeroes the gradients once, for any number of passes
        length, batch, width = config.data.seq_length, config.training.micro_batch_size, config.model.hidden_size
        # The first norm computes the gradient of the first two in any case; none of them keeps it.
        self.hidden, self.branch, self.gradient = (
            torch.randn(length, batch, width, device=device).to(torch.bfloat16) for _ in range(3)
        )
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.sequence = self.stage.describe_sequence(
            {"tokens": tokens, "sample_ids": torch.arange(batch, device=device)}, None
        )

    def pass_through(self, stopwatch: Stopwatch) -> None:
        with stopwatch.measure("forward"):
            outputs = self.stage.layers[0](self.hidden, self.branch, self.sequence)
        with stopwatch.measure("backward"):
            torch.autograd.backward(outputs, (self.gradient, self.gradient))


def measure(config: Config, device: torch.device, repeats: int) -> dict[str, Any]:
    layer = Layer(config, device)
    for _ in range(WARM_UP):
        layer.pass_through(Stopwatch(device))
    stopwatch = Stopwatch(device)
    for _ in range(repeats):
        layer.pass_through(stopwatch)
    spans = stopwatch.spans()
    seconds = {
        name: statistics.median(end - begin for label, begin, end in spans if label == name)
        for name in ("forward", "backward")
    }
    total = sum(seconds.values())
    model, tokens = config.model, config.data.seq_length * config.training.micro_batch_size
    flops = flops_of_layer(config)
    assert model.ffn_hidden_size, "the configuration is resolved"
    reached = measured_rates(layer.mesh, torch.bfloat16, tokens, model.hidden_size, model.ffn_hidden_size)
    bound = roofline(config, flops, reached)
    record = {
        "micro_batch_size": config.training.micro_batch_size,
        "milliseconds": {name: round(1e3 * value, 4) for name, value in (*seconds.items(), ("total", total))},
        **rates(flops, tokens, total, known_gpu(device)),
        "shares": shares(layer, device, total),
        "roofline_milliseconds": {name: round(1e3 * value, 4) for name, value in bound.items()},
        "roofline_over_measured": round(sum(bound.values()) / total, 4),
        "product_teraflops": round(reached.flops / 1e12, 2),
        "copy_gigabytes_per_second": round(reached.bandwidth / 1e9, 1),
    }
    layer.mesh.close()
    return record


def flops_of_layer(config: Config) -> ModelFlops:
    """Of a token, forward and backward, in one layer."""
    whole, layers = flops_per_token(config.model, config.data.seq_length), config.model.num_layers
    weights = whole.weights - head_flops_per_token(config.model, config.data.seq_length)
    return ModelFlops(weights // layers, whole.attention_full // layers, whole.seen)


def roofline(config: Config, flops: ModelFlops, reached: Gpu) -> dict[str, float]:
    """Seconds at least, by what they go to."""
    model, tokens = config.model, config.data.seq_length * config.training.micro_batch_size
    attention = flops.half - flops.weights  # of the model: a forward pass, and twice that backward
    # Numbers that are read or written for each element of hidden states: two norms, each with the residual sum before
    # it and the residual's gradient after it (forward 4, backward 4), and the turning of queries and keys (4 and 4).
    # For each of the MLP's inner vector: gate, up and their product (3 and 5).
    assert model.ffn_hidden_size, "the configuration is resolved"
    elements = tokens * (24 * model.hidden_size + 8 * model.ffn_hidden_size)
    return {
        "products": flops.weights * tokens / reached.flops,
        "attention": attention / 3 * 3.5 * tokens / reached.flops,
        "the rest": 2 * elements / reached.bandwidth,
    }


def shares(layer: Layer, device: torch.device, seconds: float) -> dict[str, float]:
    """What a pass goes to, by torch's profiler: on a GPU as shares of the measured `seconds`, of which kernels fill a
    part; on a CPU as shares of the profiled passes.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            layer.pass_through(Stopwatch(device))
        if on_gpu:
            torch.cuda.synchronize(device)
    by_kind = dict.fromkeys(("products", "attention", "the rest"), 0.0)
    busy = 0.0
    for event in profiler.key_averages():
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / PROFILED
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            busy += own  # a kernel, which is counted once more with the operator that started it
        else:
            by_kind[_kind(event.key)] += own
    if not on_gpu:
        whole = sum(by_kind.values())
        return {name: round(value / whole, 4) for name, value in by_kind.items()}
    by_kind["the rest"] = busy - by_kind["products"] - by_kind["attention"]
    by_kind["waiting"] = seconds - busy
    return {name: round(value / seconds, 4) for name, value in by_kind.items()}


def _kind(operator: str) -> str:
    if operator in PRODUCTS:
        return "products"
    return "attention" if any(word in operator for word in ATTENTION) else "the rest"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--size", choices=list(SIZES), help="default: 7b on a GPU, small on a CPU")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4], help="sequences at once")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(words)
    device = select_device(arguments.device)
    size = arguments.size or size_for(device)
    results = []
    for micro_batch_size in arguments.micro_batches:
        record = measure(configuration(size, micro_batch_size, 1), device, arguments.repeats)
        results.append(record)
        times, bound = record["milliseconds"], sum(record["roofline_milliseconds"].values())
        print(
            f"micro-batch {micro_batch_size}: {times['forward']:.2f} + {times['backward']:.2f} ms, {describe(record)}; "
            + ", ".join(f"{name} {share:.1%}" for name, share in record["shares"].items())
            + f"; roofline {bound:.2f} ms, {record['roofline_over_measured']:.1%} of the time",
            flush=True,
        )
    if arguments.output:
        gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        write(arguments.output, {"machine": machine("torch"), **gpu, "size": size, "results": results})


if __name__ == "__main__":
    main()
