"""What this device does in a second, measured in a moment before training: the rates that a prediction counts with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from megallm.mesh import Mesh
from megallm.ops.accumulate import accumulate_weight_gradient
from megallm.plan.gpus import Efficiencies, Gpu

# Products of more would take too long on a CPU; all of them together take a few hundredths of a second.
_MOST_OPERATIONS_ON_CPU = 2e8
_MOST_OPERATIONS_ON_GPU = 2e12
_REPETITIONS = 3
_MOMENT = 0.02  # seconds


def measured_rates(mesh: Mesh, dtype: torch.dtype, tokens: int, width: int, inner: int) -> Gpu:
    """Rates of this rank's device for the three products of a linear layer ([tokens, width] through [inner, width]) in
    `dtype`, for an operator on elements, and for an all-reduce over all ranks.

    Called by all ranks at once, so that processes that share cores share them here too.
    """
    device = mesh.device
    most = _MOST_OPERATIONS_ON_GPU if device.type == "cuda" else _MOST_OPERATIONS_ON_CPU
    tokens = max(1, min(tokens, int(most / (6 * width * inner))))
    # A GPU multiplies ones a tenth faster than numbers that differ: they take less power.
    generator = torch.Generator(device).manual_seed(0)
    input, output, weight = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in ((tokens, width), (tokens, inner), (inner, width))
    )
    gradient = torch.zeros(
        inner, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device
    )

    def products() -> None:
        functional.linear(input, weight)
        output.matmul(weight)
        accumulate_weight_gradient(gradient, output, input)

    product = _seconds(device, products)
    source = torch.ones(2**20 if device.type == "cpu" else 2**26, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = _seconds(device, lambda: torch.mul(source, source, out=target))
    few = torch.ones(8, dtype=dtype, device=device)
    start = _seconds(device, lambda: [few.add(1.0) for _ in range(20)]) / 20
    link = 1e12
    if mesh.world.size > 1:
        message = torch.ones(2**18, dtype=torch.float32, device=device)
        parts = 2 * (mesh.world.size - 1) / mesh.world.size
        link = parts * message.nbytes / _collective_seconds(mesh, message)
    rate = 6 * tokens * width * inner / product
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return Gpu(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        memory=memory,
        flops=rate,
        flops_32=rate,
        bandwidth=2 * source.nbytes / copy,
        link=link,
        network=link,
        # What is measured is reached; attention, which is not, stays behind products by what GPUs' kernels do.
        efficiencies=Efficiencies(product=1.0, attention=0.6, bandwidth=1.0, link=1.0),
        operator_seconds=start if device.type == "cpu" else 0.0,
    )


def _collective_seconds(mesh: Mesh, message: torch.Tensor) -> float:
    """The mean time of an all-reduce. All ranks make equally many."""
    mesh.world.all_reduce(message)
    _finish(mesh.device)
    begin = time.perf_counter()
    for _ in range(_REPETITIONS):
        mesh.world.all_reduce(message)
    _finish(mesh.device)
    return max((time.perf_counter() - begin) / _REPETITIONS, 1e-9)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The mean time of repetitions over a moment, after one that warms up: what others take of the cores counts."""
    work()
    _finish(device)
    # Waiting for a GPU takes as long as a short operator.
    at_once = 10 if device.type == "cuda" else 1
    begin = time.perf_counter()
    repetitions = 0
    while repetitions < _REPETITIONS or time.perf_counter() - begin < _MOMENT:
        for _ in range(at_once):
            work()
        _finish(device)
        repetitions += at_once
    return max((time.perf_counter() - begin) / repetitions, 1e-9)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
