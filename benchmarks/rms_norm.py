"""RMSNorm, forward and backward, native against eager torch, in one run: on the CPU with one thread, or on a GPU.

    python benchmarks/rms_norm.py [--device cuda] [--output benchmarks/results/rms_norm_cpu.json]

On a GPU the bytes that the operator must move at least, over its time, are also given as a fraction of what a copy
reaches in the same process. The ratio is eager's time over the native operator's: above 1 the native operator is
faster. The two alternate, and the median of each counts, so that a change of the machine's speed meets both.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import processor_name, write
from torch import Tensor

from megallm.ops.library import NATIVE
from megallm.ops.rms_norm import rms_norm, rms_norm_reference

SHAPES = {"cpu": [(2048, 256), (2048, 4096)], "cuda": [(4096, 4096), (32768, 4096), (16384, 8192)]}
DTYPES = [torch.float32, torch.bfloat16]
EPSILON = 1e-5
# Elements that a measurement goes over at least.
PASSES_BELOW = 2**23


def forward_backward(function: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, weight: Tensor) -> float:
    """Seconds of one forward and one backward pass, the mean of as many as make the timer's share small."""
    passes = max(1, PASSES_BELOW // x.numel()) if x.device.type == "cpu" else 20

    def work() -> None:
        y = function(x, weight, EPSILON)
        torch.autograd.grad(y, (x, weight), x.detach())

    return seconds(work, passes, x.device)


def seconds(work: Callable[[], object], passes: int, device: torch.device) -> float:
    """Mean time of one call, by the device's own clock on a GPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(passes):
            work()
        return (time.perf_counter() - start) / passes
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(passes):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / passes


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = [2 * source.numel() / seconds(lambda: target.copy_(source), 10, device) for _ in range(5)]
    return statistics.median(rates)


def torch_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def measure(
    rows: int, width: int, dtype: torch.dtype, repeats: int, device: torch.device, copied: float | None
) -> dict[str, object]:
    """Medians of all contenders. `copied` is the copy rate in bytes per second, if there is one to compare with."""
    torch.manual_seed(0)
    x = torch.randn(rows, width).to(device, dtype).requires_grad_()
    weight = torch.rand(width).to(device, dtype).requires_grad_()
    contenders = {"native": rms_norm, "eager": rms_norm_reference, "torch_rms_norm": torch_rms_norm}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        forward_backward(function, x, weight)
    for _ in range(repeats):
        for name, function in contenders.items():
            times[name].append(forward_backward(function, x, weight))
    medians = {name: statistics.median(values) for name, values in times.items()}
    # Forward: x in, y out; backward: x and the gradient in, its gradient out.
    moved = 5 * x.numel() * x.element_size() / medians["native"]
    return {
        **({"fraction_of_copy_rate": round(moved / copied, 3)} if copied else {}),
        "rows": rows,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: round(1e3 * median, 4) for name, median in medians.items()},
        "ratio_to_eager": round(medians["eager"] / medians["native"], 2),
        "ratio_to_torch_rms_norm": round(medians["torch_rms_norm"] / medians["native"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if not NATIVE.in_use:
        raise SystemExit(f"There is nothing to measure: {NATIVE.reason}.")
    if arguments.device == "cuda" and not (torch.cuda.is_available() and NATIVE.cuda_architectures):
        raise SystemExit("There is nothing to measure: no GPU is visible, or the library was built without CUDA.")
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    copied = copy_rate(device) if device.type == "cuda" else None
    results = [
        measure(*shape, dtype, arguments.repeats, device, copied) for dtype in DTYPES for shape in SHAPES[device.type]
    ]
    for result in results:
        print(
            f"{result['rows']} x {result['width']} {result['dtype']}: {result['milliseconds']} ms, "
            f"{result['ratio_to_eager']} x eager, {result['ratio_to_torch_rms_norm']} x torch's rms_norm"
            + (f", {result['fraction_of_copy_rate']} of the copy rate" if copied else "")
        )
    if arguments.output:
        record = {
            "date": datetime.date.today().isoformat(),
            "processor": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
            "torch": torch.__version__,
            "threads": 1,
            "results": results,
        }
        write(arguments.output, record)


if __name__ == "__main__":
    main()
