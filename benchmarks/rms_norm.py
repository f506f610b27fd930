"""RMSNorm, forward and backward, native against eager torch on the CPU with one thread, in one run.

    python benchmarks/rms_norm.py [--output benchmarks/results/rms_norm_cpu.json]

The ratio is eager's time over the native operator's: above 1 the native operator is faster. The two alternate, and the
median of each counts, so that a change of the machine's speed meets both.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megallm.ops.library import NATIVE
from megallm.ops.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(2048, 256), (2048, 4096)]
DTYPES = [torch.float32, torch.bfloat16]
EPSILON = 1e-5
# Elements that a measurement goes over at least.
PASSES_BELOW = 2**23


def forward_backward(function: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, weight: Tensor) -> float:
    """Seconds of one forward and one backward pass, the mean of as many as make the timer's share small."""
    passes = max(1, PASSES_BELOW // x.numel())
    start = time.perf_counter()
    for _ in range(passes):
        y = function(x, weight, EPSILON)
        torch.autograd.grad(y, (x, weight), x.detach())
    return (time.perf_counter() - start) / passes


def torch_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def measure(rows: int, width: int, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.rand(width).to(dtype).requires_grad_()
    contenders = {"native": rms_norm, "eager": rms_norm_reference, "torch_rms_norm": torch_rms_norm}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        forward_backward(function, x, weight)
    for _ in range(repeats):
        for name, function in contenders.items():
            times[name].append(forward_backward(function, x, weight))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows": rows,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: round(1e3 * median, 4) for name, median in medians.items()},
        "ratio_to_eager": round(medians["eager"] / medians["native"], 2),
        "ratio_to_torch_rms_norm": round(medians["torch_rms_norm"] / medians["native"], 2),
    }


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if not NATIVE.in_use:
        raise SystemExit(f"There is nothing to measure: {NATIVE.reason}.")
    torch.set_num_threads(1)
    results = [measure(*shape, dtype, arguments.repeats) for dtype in DTYPES for shape in SHAPES]
    for result in results:
        print(
            f"{result['rows']} x {result['width']} {result['dtype']}: {result['milliseconds']} ms, "
            f"{result['ratio_to_eager']} x eager, {result['ratio_to_torch_rms_norm']} x torch's rms_norm"
        )
    if arguments.output:
        record = {
            "date": datetime.date.today().isoformat(),
            "processor": processor_name(),
            "torch": torch.__version__,
            "threads": 1,
            "results": results,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
