"""Runs a program on a GPU that is the host.

    python -m tests.host_gpu.device LIBRARY pretrain_gpt.py --device cuda ...
    python -m tests.host_gpu.device LIBRARY -m pytest tests/gpu/test_engine.py

LIBRARY is device.cpp, compiled (`build`). What the project asks of `torch.cuda`, of which a torch without CUDA has the
names alone, is answered as on a machine with one H100.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 2**30
PROPERTIES = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * GIB, major=9, minor=0)


class Event:
    """In place of torch.cuda.Event: everything has happened when it was called."""

    def __init__(self, **settings: bool) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1e3 * (end._seconds - self._seconds)


class Stream:
    """In place of torch.cuda.Stream."""

    def synchronize(self) -> None: ...


def build(folder: Path) -> Path:
    """Compiles device.cpp into `folder`: 10 seconds."""
    from torch.utils import cpp_extension

    library = folder / "device.so"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-shared", "-fPIC"]
    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    linked = [part for path in cpp_extension.library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    source = str(Path(__file__).with_name("device.cpp"))
    subprocess.run([*compiler, source, "-o", str(library), *headers, *linked, "-lc10", "-ltorch_cpu"], check=True)
    return library


def pretend(library: ctypes.CDLL) -> None:
    """Gives torch.cuda answers, and the native operators a version for the device."""
    import torch

    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "current_stream": lambda device=None: Stream(),
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: None,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_properties": lambda device=None: PROPERTIES,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_sync_debug_mode": lambda mode: library.let_waiting_be_an_error(mode == "error"),
        "Event": Event,
    }
    figures = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    for name, answer in (answers | {figure: lambda device=None: GIB for figure in figures}).items():
        setattr(torch.cuda, name, answer)

    from megallm.ops.library import NATIVE

    library.run_library_on_host(b"megallm::")
    object.__setattr__(NATIVE, "cuda_architectures", ("9.0",))
    object.__setattr__(NATIVE, "on_cuda", NATIVE.on_cpu)


def main() -> None:
    path, *program = sys.argv[1:]
    pretend(ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL))  # loads it before torch
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).resolve().parent))  # as Python does
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
