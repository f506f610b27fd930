"""`python -m megallm.info`: what this machine has and what megallm uses of it, as text or (`--json`) for programs."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from typing import TYPE_CHECKING, Any

import numpy
import torch

import megallm
from megallm.config import fail
from megallm.config.operators import OPERATORS, OTHERS
from megallm.config.report import while_somebody_reads

if TYPE_CHECKING:
    from megallm.ops.library import NativeLibrary

# Import name and the name it is distributed under.
OPTIONAL_PACKAGES = {
    "transformers": "transformers",
    "wandb": "wandb",
    "matplotlib": "matplotlib",
    "pyarrow": "pyarrow",
    "zstandard": "zstandard",
    "tiktoken": "tiktoken",
    "gigatoken": "gigatoken",
    "sentencex": "sentencex",
    "flash_attn": "flash-attn",
    "apex": "apex",
}


def collect() -> dict[str, Any]:
    """Everything that is reported, in values that JSON knows. Needs no extension and no GPU.

    Raises ValueError with a sentence where MEGALLM_OPS cannot be followed.
    """
    from megallm.ops.library import NATIVE as native

    return {
        "versions": {
            "megallm": megallm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "devices": _devices(native),
        "processor": {
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "native_operators": {
            "built": native.loaded,
            "in_use": native.in_use,
            "reason": native.reason,
            "cuda_architectures": list(native.cuda_architectures),
        },
        "operators": {operator: _operator(operator, native) for operator in OPERATORS},
        "data_helpers": {"built": _imports("megallm.data.samples._helpers")},
        "communication": {
            "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
            "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        },
        "optional_packages": {name: _version(name, package) for name, package in OPTIONAL_PACKAGES.items()},
    }


def _devices(native: NativeLibrary) -> list[dict[str, Any]]:
    """The GPUs that torch can use."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        devices.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{capability[0]}.{capability[1]}",
                "native_operators": native.in_use and native.covers(capability),
            }
        )
    return devices


def _operator(operator: str, native: NativeLibrary) -> dict[str, Any]:
    """For which devices an operator is built, what runs unless `--ops` says otherwise, and what else there is."""
    from megallm.ops.library import other_library

    built = [name for name, operators in (("CPU", native.on_cpu), ("CUDA", native.on_cuda)) if operator in operators]
    others = [name for name, operators in OTHERS.items() if operator in operators and other_library(name)]
    return {
        "built_for": built,
        "in_use": "native" if built and native.in_use else "reference",
        "choices": [*(["native"] if built else []), "reference", *others],
    }


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _version(module: str, package: str) -> str | None:
    """The version of an optional package, without importing it; None when it is absent."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def describe(info: dict[str, Any]) -> str:
    """The report for people, one fact a line."""
    native = info["native_operators"]
    if native["built"]:
        architectures = ", ".join(native["cuda_architectures"])
        operators = f"built for CPU and CUDA ({architectures})" if architectures else "built for CPU"
        operators += ", in use" if native["in_use"] else f", not in use: {native['reason']}"
    else:
        operators = f"not in use: {native['reason']}; plain torch does their work, slower"
    processor = info["processor"]
    devices = [
        f"{device['name']}, {device['memory_gib']} GiB, compute capability {device['capability']}, "
        f"native operators {'yes' if device['native_operators'] else 'no'}"
        for device in info["devices"]
    ]
    present = [f"{name} {version}" for name, version in info["optional_packages"].items() if version]
    absent = [name for name, version in info["optional_packages"].items() if not version]
    rows = [
        *info["versions"].items(),
        ("GPUs", "; ".join(devices) or "none"),
        (
            "processor",
            f"{processor['cores']} cores, {processor['usable_cores']} usable, "
            f"{processor['torch_threads']} torch threads",
        ),
        ("native operators", operators),
        *((f"  {name}", _describe_operator(operator)) for name, operator in info["operators"].items()),
        ("data helpers", "built" if info["data_helpers"]["built"] else "not built; numpy does their work, slower"),
        ("communication", ", ".join(name for name, there in info["communication"].items() if there) or "none"),
        ("optional packages", ", ".join(present) or "none"),
        ("absent", ", ".join(absent) or "none"),
    ]
    width = max(18, *(len(name) for name, _ in rows))
    return "\n".join(f"{name:{width}} {value}" for name, value in rows)


def _describe_operator(operator: dict[str, Any]) -> str:
    built = f"built for {' and '.join(operator['built_for'])}" if operator["built_for"] else "not built"
    return f"{built}, in use: {operator['in_use']}, choices: {', '.join(operator['choices'])}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megallm.info", description="Says what this machine has and what is used."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        info = collect()
    except ValueError as error:
        fail(parser.prog, error)
    with while_somebody_reads():
        print(json.dumps(info, indent=2) if arguments.json else describe(info))


if __name__ == "__main__":
    main()
