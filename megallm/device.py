"""Where a process runs: CPU or GPU, and which communication backend serves it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch


def select_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of this process.

    `name` is "cpu", "cuda" or "auto" (a GPU where one is visible). With more processes than GPUs on a machine, several
    share one.

    Raises ValueError if a GPU is asked for and none is visible.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "--device cuda was asked for, but this torch sees no GPU. Use --device cpu, or install a torch with CUDA "
            "and check CUDA_VISIBLE_DEVICES."
        )
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def select_backend(device: torch.device, local_world_size: int, requested: str | None = None) -> str:
    """`nccl` with a GPU for each process, else `gloo`: NCCL refuses two processes on one GPU.

    Raises ValueError if NCCL is asked for and cannot serve this machine.
    """
    own_gpu = device.type == "cuda" and local_world_size <= torch.cuda.device_count()
    if requested == "nccl" and not own_gpu:
        raise ValueError(
            f"--distributed-backend nccl needs one GPU for each of the {local_world_size} processes on this machine, "
            f"but {torch.cuda.device_count()} are visible. Leave the flag out to use gloo, or start fewer processes."
        )
    return requested or ("nccl" if own_gpu else "gloo")


def use_one_thread_per_process(local_world_size: int) -> None:
    """Threads of several CPU processes that spin for the same cores make each other several times slower.

    Raises ValueError where OMP_NUM_THREADS is no number.
    """
    if local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    elif local_world_size > 1:
        threads = os.environ["OMP_NUM_THREADS"]
        if not threads.isdecimal() or int(threads) < 1:
            raise ValueError(
                f"OMP_NUM_THREADS is {threads!r}, no number of threads for each of the {local_world_size} processes on "
                "this machine: give 1, or leave it unset, which means the same"
            )
        torch.set_num_threads(int(threads))


def compute_deterministically() -> None:
    """Holds this process to algorithms that give the same bits in every run; torch raises RuntimeError where it has
    none. To be called before anything is computed on a GPU.

    Our own operators, whose order of additions is fixed, are so anyway. What the environment says of cuBLAS and NCCL
    stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products
    os.environ.setdefault("NCCL_ALGO", "Ring")  # not chosen anew by what the network is like
    torch.use_deterministic_algorithms(True)
    # Memory that nobody has written is not read here: filling it would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next tensor, for the rest of this process.

    Of itself it maps every large tensor anew, and the system zeroes it page by page at the first write: for an
    elementwise operator about as much work again. The process then holds the most that it ever needed, and what its
    heap leaves unused. Another C library or allocator is left as it is. Source: mallopt(3).
    """
    trim_threshold, mmap_max = -1, -4  # the parameters' numbers in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)


class Readback:
    """Copies a small tensor to the host without waiting: `values()` waits for that copy alone, not for later work."""

    def __init__(self, values: torch.Tensor) -> None:
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._done = torch.cuda.Event() if values.is_cuda else None
        if self._done is not None:
            self._done.record()

    def values(self) -> list[float]:
        """The tensor's elements."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()


def memory_in_bytes(device: torch.device) -> dict[str, int]:
    """Memory of this process on a GPU, by Megatron's names; without one, the most that it ever held resident.

    Waits for nothing.
    """
    if device.type == "cuda":
        return {
            "mem-allocated-bytes": torch.cuda.memory_allocated(device),
            "mem-max-allocated-bytes": torch.cuda.max_memory_allocated(device),
            "mem-reserved-bytes": torch.cuda.memory_reserved(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"mem-max-resident-bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class HostCopies:
    """Copies of tensors in the host's memory (pinned, of a GPU's tensors), taken again and again into the same places.

    The tensors are the same ones each time, or others of their shapes and types.
    """

    def __init__(self) -> None:
        self._copies: list[torch.Tensor] = []

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of `tensors`; returns when these may change. The copies hold until the next call."""
        if not self._copies:
            self._copies = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return self._copies


class Measures(Protocol):
    """Whatever wants to know when something begins and ends."""

    def measure(self, label: Any) -> AbstractContextManager[None]:
        """Everything done within is one span called `label`."""


class Together:
    """Several of them at once, or none."""

    def __init__(self, *parts: Measures) -> None:
        self._parts = parts

    @contextmanager
    def measure(self, label: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.measure(label))
            yield


class Stopwatch:
    """Measures spans of work on a device without stopping it: events on a GPU, the clock on a CPU.

    Spans count from when the stopwatch was made: to compare ranks, make theirs right after a barrier.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any, Any]] = []
        self._start = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def measure(self, label: Any) -> Iterator[None]:
        """Everything done within is one span called `label`."""
        begin = self._now()
        yield
        self._spans.append((label, begin, self._now()))

    def spans(self) -> list[tuple[Any, float, float]]:
        """(label, begin, end) in seconds since this stopwatch was made. Waits until the last span is over."""
        if not self._cuda:
            return [(label, begin - self._start, end - self._start) for label, begin, end in self._spans]
        if self._spans:
            self._spans[-1][2].synchronize()
        elapsed = self._start.elapsed_time
        return [(label, elapsed(begin) / 1e3, elapsed(end) / 1e3) for label, begin, end in self._spans]
