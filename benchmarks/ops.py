"""Native operators against torch, one by one, forward and backward, in one run: on the CPU or on a GPU.

    python benchmarks/ops.py [--device cuda] [--threads 1 2] [--only swiglu rms_norm] [--output FILE]

On the CPU the figure is eager's time over the native operator's: above 1 the native operator is faster; beside it that
of a copy, which reads and writes as many bytes together as the operator must at least. On a GPU it is these bytes over
its time, as a fraction of what a copy reaches in the same process; cold, with the L2 cache flushed before each call,
and warm. Beside the reference in eager mode stand the same one compiled by torch (`--compile`, which takes many seconds
for each), torch's own fused operators, and those of apex, Liger and QuACK where they are installed. All take turns, and
the median of each counts, so that a change of the machine's speed meets all. On the CPU the C library keeps freed
memory, for all of them, as it does in training, so that no figure holds the system's zeroing of pages.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from record import machine, write
from torch import Tensor

from megallm import ops
from megallm.device import keep_freed_memory
from megallm.ops.accumulate import accumulate
from megallm.ops.adamw import adamw
from megallm.ops.cross_entropy import CrossEntropy, cross_entropy
from megallm.ops.embedding import accumulate_rows, add_rows
from megallm.ops.library import NATIVE
from megallm.ops.sum_of_squares import sum_of_squares

# On a GPU the first is the one that counts: 256 MiB in 16 bits, beyond any cache.
SHAPES = {"cpu": [(4096, 1024), (2048, 4096)], "cuda": [(32768, 4096), (4096, 4096), (16384, 11008)]}
DTYPES = [torch.float32, torch.bfloat16]
EPSILON = 1e-5
# Larger than any GPU's L2 cache.
FLUSHED_BYTES = 2**28
# About a fifth of a millisecond of a GPU's clock.
HEAD_START_CYCLES = 400_000

Make = Callable[[int, int, torch.dtype, torch.device], tuple[Tensor, ...]]


def _randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers that require gradients, made on the device: a CPU would take longer than all that is measured."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def normal(*widths: float) -> Make:
    """Random tensors [rows, width x each of `widths`] that require gradients."""

    def make(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        shapes = [(rows, int(width * each)) for each in widths]
        return tuple(_randn(*shape, dtype=dtype, device=device) for shape in shapes)

    return make


def normal_and_weights(inputs: int, weights: int) -> Make:
    """`inputs` random tensors [rows, width], then `weights` of [width], all requiring gradients."""

    def make(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        tensors = [_randn(rows, width, dtype=dtype, device=device) for _ in range(inputs)]
        return (*tensors, *(_randn(width, dtype=dtype, device=device) for _ in range(weights)))

    return make


@dataclass(frozen=True)
class Operator:
    """One line of the table.

    Attributes:
        make: (rows, width, dtype, device) -> the inputs; those that require gradients get them.
        call: (implementation) -> the function of the inputs.
        moved: elements of [rows, width] that the forward and the backward pass read and write at least.
        own_rivals, rivals: further implementations of the operator in megallm, and functions from other packages, by
            package.
        moved_in_16_bits: as `moved`, where that is another number for 16-bit inputs.
        spends_its_inputs: the backward pass writes over them, so that each needs a forward pass of its own before.
    """

    name: str
    make: Make
    call: Callable[[str], Callable[..., Any]]
    moved: tuple[float, float]
    own_rivals: Sequence[str] = ()
    rivals: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    moved_in_16_bits: tuple[float, float] | None = None
    spends_its_inputs: bool = False


def _liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPSILON, 0.0, "llama", False)


def _quack_rms_norm() -> Callable[..., Any]:
    from quack import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=EPSILON)


def _liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))


def _activation(name: str) -> Callable[[str], Callable[..., Any]]:
    """An activation, with the bias of the layer before it where it gets one."""
    function = getattr(ops, name)
    return lambda implementation: lambda x, bias=None: function(x, bias, implementation)


def _norm_of_sum(kind: str) -> Callable[[str], Callable[..., Any]]:
    def of(implementation: str) -> Callable[..., Any]:
        return lambda x, residual, weight, bias=None: ops.norm_of_sum(
            x, residual, weight, bias, EPSILON, kind, implementation
        )

    return of


HEAD_DIM = 128


def _logits(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    logits = _randn(rows, width, dtype=dtype, device=device)
    return logits, torch.randint(0, width, (rows,), device=device)


def _cross_entropy(implementation: str) -> Callable[..., Any]:
    return lambda logits, targets: cross_entropy(logits, targets, CrossEntropy(logits.shape[-1]), implementation)


def _torch_cross_entropy() -> Callable[..., Any]:
    return lambda logits, targets: torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _packed(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Queries, keys and values of `width` features each, and tables for as many positions as rows."""
    angles = torch.randn(rows, 1, 1, HEAD_DIM, device=device)
    packed = _randn(rows, 1, 3 * width, dtype=dtype, device=device)
    return packed, angles.cos(), angles.sin()


def _split_and_rotate(implementation: str) -> Callable[..., Any]:
    def split(packed: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, ...]:
        heads = packed.shape[-1] // (3 * HEAD_DIM)
        return ops.split_and_rotate(packed, (heads, heads, heads), cosines, sines, False, implementation)

    return split


def _scores(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Attention scores of heads with `width` keys: square where there are rows enough. The numbers of their rows."""
    queries = min(rows, width)
    scores = _randn(1, rows // queries, queries, width, dtype=dtype, device=device)
    return scores, torch.arange(rows, device=device).view(scores.shape[:-1])


def _softmax(*, causal: bool, probability: float) -> Callable[[str], Callable[..., Any]]:
    def of(implementation: str) -> Callable[..., Any]:
        def softmax(scores: Tensor, rows: Tensor) -> Tensor:
            dropout = _dropout(probability, rows) if probability else None
            return ops.scaled_masked_softmax(
                scores, None, 0.125, causal, dropout=dropout, implementation=implementation
            )

        return softmax

    return of


def _torch_softmax() -> Callable[..., Any]:
    return lambda scores, rows: torch.softmax(scores * 0.125, dim=-1)


def _dropout(probability: float, rows: Tensor) -> ops.Dropout:
    key, step = torch.ones(2, dtype=torch.int64, device=rows.device), torch.zeros_like(rows.view(-1)[0])
    return ops.Dropout(probability, key, step, rows)


def _with_rows_and_bias(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    x, residual, bias = normal_and_weights(2, 1)(rows, width, dtype, device)
    return x, residual, bias, torch.arange(rows, device=device)


def _dropout_add(implementation: str) -> Callable[..., Any]:
    return lambda x, residual, bias, rows: ops.dropout_add(x, _dropout(0.1, rows), bias, residual, implementation)


def _torch_dropout_add() -> Callable[..., Any]:
    return lambda x, residual, bias, rows: residual + torch.nn.functional.dropout(x + bias, 0.1)


def _flat_state(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """float32 weights, gradient and moments, and for a 16-bit dtype the model's weights."""
    tensors = [torch.rand(rows * width, device=device) for _ in range(4)]
    return (*tensors, tensors[0].to(dtype)) if dtype.itemsize == 2 else tuple(tensors)


def _adamw(implementation: str) -> Callable[..., Any]:
    def update(weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rounded: Tensor | None = None) -> None:
        def scalar(value: float) -> Tensor:
            return torch.full((), value, dtype=torch.float64, device=weights.device)

        adamw(
            weights,
            gradient,
            first,
            second,
            torch.ones((), device=weights.device),
            rounded,
            learning_rate=scalar(1e-3),
            weight_decay=scalar(0.1),
            gradient_scale=scalar(0.9),
            skip=scalar(0.0),
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            implementation=implementation,
        )

    return update


def _flat(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """A float32 gradient, and what a backward pass adds to it."""
    return torch.rand(rows * width, device=device), torch.rand(rows * width, device=device).to(dtype)


def _accumulate(implementation: str) -> Callable[..., Any]:
    return lambda target, source: accumulate(target, source, implementation=implementation)


def _sum_of_squares(implementation: str) -> Callable[..., Any]:
    return lambda gradient, _: sum_of_squares([gradient], gradient.device, implementation)


def _table(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """A float32 table, a tensor with as many rows, and which row of the table each of them belongs to: each to one."""
    x = torch.randn(rows, width, device=device).to(dtype)
    return torch.zeros(rows, width, device=device), x, torch.randperm(rows, device=device)


def _add_rows(implementation: str) -> Callable[..., Any]:
    return lambda table, x, rows: add_rows(x, x, rows, implementation)


def _embedding_gradient(implementation: str) -> Callable[..., Any]:
    return lambda table, gradient, rows: accumulate_rows(table, gradient, rows, implementation)


OPERATORS = [
    Operator(
        "cross_entropy",
        _logits,
        _cross_entropy,
        moved=(1, 2),
        rivals={"torch": _torch_cross_entropy},
        spends_its_inputs=True,
    ),
    # Queries and keys forward; backward the values' gradient is put in its place too.
    Operator("split_and_rotate", _packed, _split_and_rotate, moved=(4, 6)),
    Operator(
        "softmax", _scores, _softmax(causal=False, probability=0.0), moved=(2, 3), rivals={"torch": _torch_softmax}
    ),
    # Half is read, all is written.
    Operator("softmax_causal", _scores, _softmax(causal=True, probability=0.0), moved=(1.5, 2)),
    Operator("softmax_causal_dropout", _scores, _softmax(causal=True, probability=0.1), moved=(2.5, 2)),
    # torch's own dropout, beside them, takes its numbers in the order of calls.
    Operator("dropout_add", _with_rows_and_bias, _dropout_add, moved=(3, 2), rivals={"torch": _torch_dropout_add}),
    Operator("adamw", _flat_state, _adamw, moved=(7, 0), moved_in_16_bits=(15, 0), own_rivals=("torch",)),
    Operator("accumulate", _flat, _accumulate, moved=(3, 0), moved_in_16_bits=(5, 0)),
    Operator("sum_of_squares", _flat, _sum_of_squares, moved=(1, 0), moved_in_16_bits=(2, 0)),
    Operator("add_rows", _table, _add_rows, moved=(3, 0)),
    Operator("embedding_gradient", _table, _embedding_gradient, moved=(3, 0), moved_in_16_bits=(5, 0)),
    Operator(
        "layer_norm",
        normal_and_weights(1, 2),
        lambda implementation: lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPSILON, implementation),
        moved=(2, 3),
        own_rivals=("torch", "apex"),
    ),
    Operator("rms_norm_of_sum", normal_and_weights(2, 1), _norm_of_sum("RMSNorm"), moved=(4, 4)),
    Operator("layer_norm_of_sum", normal_and_weights(2, 2), _norm_of_sum("LayerNorm"), moved=(4, 4)),
    Operator(
        "rms_norm",
        normal_and_weights(1, 1),
        lambda implementation: lambda x, weight: ops.rms_norm(x, weight, EPSILON, implementation),
        moved=(2, 3),
        own_rivals=("torch", "apex"),
        rivals={"liger_kernel": _liger_rms_norm, "quack": _quack_rms_norm},
    ),
    Operator("swiglu", normal(2), _activation("swiglu"), moved=(3, 5), rivals={"liger_kernel": _liger_swiglu}),
    Operator("geglu", normal(2), _activation("geglu"), moved=(3, 5)),
    Operator("gelu", normal_and_weights(1, 1), _activation("gelu"), moved=(2, 3)),
    Operator("gelu_without_bias", normal(1), _activation("gelu"), moved=(2, 3)),
    Operator("gelu_tanh", normal_and_weights(1, 1), _activation("gelu_tanh"), moved=(2, 3)),
    Operator("squared_relu", normal(1), _activation("squared_relu"), moved=(2, 3)),
]


def contenders(operator: Operator, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Everything that computes the operator here, by name."""
    found = {"native": operator.call("native"), "eager": operator.call("reference")}
    if compiled:
        torch._dynamo.reset()
        found["compiled"] = torch.compile(operator.call("reference"), dynamic=False, mode="max-autotune-no-cudagraphs")
    for choice in operator.own_rivals:
        if importlib.util.find_spec(choice) is not None:
            found[choice] = operator.call(choice)
    for package, load in operator.rivals.items():
        if importlib.util.find_spec(package) is not None:
            found[package] = load()
    return found


class Pass:
    """The forward or the backward pass of one contender on its inputs, to be called again and again."""

    def __init__(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], *, backward: bool, spends_its_inputs: bool
    ) -> None:
        self._given, self._spends_its_inputs = inputs, spends_its_inputs
        self._function, self._inputs = function, [tensor.detach().clone() for tensor in inputs]
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.requires_grad_(given.requires_grad)
        self._leaves = [tensor for tensor in self._inputs if tensor.requires_grad]
        self._is_backward = backward
        if backward:
            self._outputs = self._run()
            self._grads = [torch.randn_like(output) for output in self._outputs]

    def prepare(self) -> None:
        """What a call needs before it, and is not measured."""
        if self._is_backward and self._spends_its_inputs:
            for mine, given in zip(self._inputs, self._given, strict=True):
                mine.data.copy_(given)
            self._outputs = self._run()

    def _run(self) -> tuple[Tensor, ...]:
        found = self._function(*self._inputs)
        outputs = (found,) if isinstance(found, Tensor) else tuple(found)
        return tuple(output for output in outputs if output.requires_grad)

    def __call__(self) -> object:
        if self._is_backward:
            return torch.autograd.grad(self._outputs, self._leaves, self._grads, retain_graph=True)
        return self._function(*self._inputs)


class Copy:
    """A copy that reads and writes as many bytes together as an operator must, into memory that is there."""

    def __init__(self, moved_bytes: int) -> None:
        self._source = torch.zeros(moved_bytes // 2, dtype=torch.uint8)
        self._target = torch.zeros_like(self._source)

    def prepare(self) -> None:
        pass

    def __call__(self) -> object:
        return self._target.copy_(self._source)


class Clock:
    """Seconds of one call: of the device's own clock on a GPU, there with a cold or a warm cache."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._scratch = torch.empty(FLUSHED_BYTES if self._is_gpu else 0, dtype=torch.uint8, device=device)

    def seconds(self, work: Callable[[], object], *, cold: bool = False) -> float:
        if not self._is_gpu:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The device waits until the host has started all of the call: else its first kernel would be late, and that
        # would count as the kernel's time.
        torch.cuda._sleep(HEAD_START_CYCLES)
        if cold:
            self._scratch.zero_()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def copy_rate(self) -> float:
        """Bytes per second that a copy of 1 GiB reads and writes."""
        source = torch.empty(2**30, dtype=torch.uint8, device=self._scratch.device)
        target = torch.empty_like(source)
        times = [self.seconds(lambda: target.copy_(source)) for _ in range(20)]
        return 2 * source.numel() / statistics.median(times)


def spread(times: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median and the 20th and 80th percentile."""
    cuts = statistics.quantiles(times, n=10)
    return {"median": 1e3 * statistics.median(times), "p20": 1e3 * cuts[1], "p80": 1e3 * cuts[7]}


def measure(
    operator: Operator, shape: tuple[int, int], dtype: torch.dtype, clock: Clock, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A record for each pass and state of the cache."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    inputs = operator.make(*shape, dtype, device)
    functions = contenders(operator, arguments.compile)
    records = []
    all_moved = operator.moved_in_16_bits if operator.moved_in_16_bits and dtype.itemsize == 2 else operator.moved
    for name, moved in zip(("forward", "backward"), all_moved, strict=True):
        if not moved:
            continue
        bytes_moved = int(moved * shape[0] * shape[1] * dtype.itemsize)
        passes: dict[str, Pass | Copy] = {
            who: Pass(function, inputs, backward=name == "backward", spends_its_inputs=operator.spends_its_inputs)
            for who, function in functions.items()
        }
        if device.type == "cpu":
            passes["copy"] = Copy(bytes_moved)
        for state in ("cold", "warm") if device.type == "cuda" else ("warm",):
            times: dict[str, list[float]] = {who: [] for who in passes}
            for repeat in range(arguments.repeats + 2):
                for who, work in passes.items():
                    work.prepare()
                    taken = clock.seconds(work, cold=state == "cold")
                    if repeat >= 2:
                        times[who].append(taken)
            records.append(
                {
                    "operator": operator.name,
                    "pass": name,
                    "rows": shape[0],
                    "width": shape[1],
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": torch.get_num_threads(),
                    "cache": state,
                    "bytes": bytes_moved,
                    "milliseconds": {who: spread(values) for who, values in times.items()},
                }
            )
    return records


def add_ratios(record: dict[str, Any], copy_rate: float | None) -> dict[str, Any]:
    """Each contender's time over the native one's, and on a GPU each one's fraction of the copy rate."""
    medians = {who: times["median"] for who, times in record["milliseconds"].items()}
    ratios = {who: round(median / medians["native"], 2) for who, median in medians.items() if who != "native"}
    record["times_the_native_time"] = ratios
    if copy_rate is not None:
        rates = {who: record["bytes"] / (median / 1e3) / copy_rate for who, median in medians.items()}
        record["fraction_of_copy_rate"] = {who: round(rate, 3) for who, rate in rates.items()}
    return record


def table_row(record: dict[str, Any]) -> str:
    figures = record.get("fraction_of_copy_rate", record["times_the_native_time"])
    what = f"{record['operator']:22} {record['pass']:8} {record['rows']:6} x {record['width']:<6} {record['dtype']:9}"
    native = record["milliseconds"]["native"]["median"]
    return f"{what} {record['threads']} {record['cache']:4} {native:9.3f} ms  " + "  ".join(
        f"{who} {figure:.2f}" for who, figure in figures.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="on the CPU: torch threads, one after other"
    )
    parser.add_argument("--only", nargs="+", choices=[operator.name for operator in OPERATORS], help="some operators")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after so many nothing new is measured")
    parser.add_argument("--compile", action="store_true", help="also the reference compiled by torch")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if not NATIVE.loaded:
        raise SystemExit(f"There is nothing to measure: {NATIVE.reason}.")
    if device.type == "cuda" and not (torch.cuda.is_available() and NATIVE.cuda_architectures):
        raise SystemExit("There is nothing to measure: no GPU is visible, or the library was built without CUDA.")
    about = machine("torch")
    keep_freed_memory()
    clock = Clock(device)
    copy_rate = clock.copy_rate() if device.type == "cuda" else None
    if copy_rate is not None:
        about |= {"gpu": torch.cuda.get_device_name(), "copy_rate": copy_rate}
    chosen = [operator for operator in OPERATORS if not arguments.only or operator.name in arguments.only]
    all_threads = arguments.threads if device.type == "cpu" else [1]
    results, left_out, end = [], [], time.monotonic() + arguments.seconds
    # Shapes last: each operator has been measured once before any is at another size.
    for threads, shape, dtype, operator in product(all_threads, SHAPES[device.type], reversed(DTYPES), chosen):
        if time.monotonic() > end:
            left_out.append(f"{operator.name}, {dtype}, {shape[0]} x {shape[1]}")
        else:
            torch.set_num_threads(threads)
            for record in measure(operator, shape, dtype, clock, arguments):
                results.append(add_ratios(record, copy_rate))
                print(table_row(results[-1]), flush=True)
        if arguments.output:  # each time: who runs out of time has what was measured
            write(arguments.output, {**about, "results": results, "left_out": left_out})
    if left_out:
        print(f"{len(left_out)} measurements were left out for want of time")


if __name__ == "__main__":
    main()
