"""The compiled operators: loaded once, when this module is imported, and used wherever they apply.

Each operator takes an `implementation`, by default "auto": the native one where it is built for the tensor's device,
elsewhere its reference in plain torch, which gives the same results up to rounding, slower. A missing library is
reported once. `MEGALLM_OPS` moves that default for everything in the process: `reference` leaves the library unused,
`native` makes its absence an error.
"""

import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megallm.config.operators import OPERATORS, OTHERS, OperatorChoices


@dataclass(frozen=True)
class NativeLibrary:
    """What the compiled library offers to this process.

    `reason` says why it is not in use, and is empty when it is. `cuda_architectures` are the GPU architectures it was
    compiled for, for example `("8.0", "9.0+PTX")`; empty when it was compiled without CUDA. `on_cpu` and `on_cuda` name
    the operators (of `OPERATORS`) that it has: all of them, unless it is older than this code.
    """

    loaded: bool
    cuda_architectures: tuple[str, ...]
    reason: str
    on_cpu: frozenset[str] = frozenset(OPERATORS)
    on_cuda: frozenset[str] = frozenset(OPERATORS)

    @property
    def in_use(self) -> bool:
        return self.loaded and not self.reason

    def serves(self, operator: str, tensor: torch.Tensor, implementation: str) -> bool:
        """Whether `operator` is to run natively on this tensor, which is on the CPU or a GPU.

        Raises RuntimeError where "native" was asked for and the library cannot.
        """
        if implementation not in ("auto", "native") or (implementation == "auto" and not self.in_use):
            return False
        if tensor.device.type == "cpu":
            can = self.loaded and operator in self.on_cpu
        elif tensor.device.type == "cuda":
            can = self.loaded and operator in self.on_cuda and _runs_on(tensor.device.index, self.cuda_architectures)
        else:
            can = False
        if implementation == "native" and not can:
            raise RuntimeError(f"the native {operator} was asked for, but it is not built for {tensor.device}")
        return can

    def covers(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run one of the compiled architectures.

        Compiled code runs on its own major version, from its minor version on; PTX is translated for everything newer.
        """
        return any(_covers(architecture, capability) for architecture in self.cuda_architectures)


def _runs_on(device_index: int, architectures: tuple[str, ...]) -> bool:
    capability = torch.cuda.get_device_capability(device_index)
    return any(_covers(architecture, capability) for architecture in architectures)


# A compiler takes the answer for a constant: it does not follow what asks the driver. This is what
# `torch._dynamo.assume_constant_result` does, whose import takes as long as that of all the rest.
_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _covers(architecture: str, capability: tuple[int, int]) -> bool:
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if match is None:
        return False
    built = (int(match[1]), int(match[2]))
    if match[3]:
        return capability == built
    return capability >= built and (capability[0] == built[0] or match[4] is not None)


def load(choice: str) -> NativeLibrary:
    """Loads the compiled library, which registers it with torch; says on one process of a machine when it is missing.

    `choice` is "auto", "native" or "reference" (loaded all the same, for comparison, but not used). Raises ValueError
    where "native" is not there, and for anything else.
    """
    if choice not in ("auto", "native", "reference"):
        raise ValueError(f"MEGALLM_OPS={choice!r} is not known: use auto, native or reference.")
    try:
        extension = importlib.import_module("megallm._C")
    except ImportError as error:
        reason = f"the compiled library is not there ({error})"
        if choice == "native":
            raise ValueError(f"MEGALLM_OPS=native, but {reason}. Build it with: pip install .") from error
        if choice == "auto" and os.environ.get("LOCAL_RANK", "0") == "0":
            logging.getLogger("megallm").warning(
                "Native operators are not in use: %s. Everything works without them, slower.", reason
            )
        return NativeLibrary(False, (), reason, on_cpu=frozenset(), on_cuda=frozenset())
    architectures = tuple(filter(None, re.split(r"[; ]+", extension.cuda_architectures)))
    reason = "MEGALLM_OPS=reference" if choice == "reference" else ""
    return NativeLibrary(True, architectures, reason, on_cpu=_registered("CPU"), on_cuda=_registered("CUDA"))


def _registered(key: str) -> frozenset[str]:
    """The operators all of whose parts the loaded library has for a device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("megallm::")}
    return frozenset(
        operator
        for operator, parts in OPERATORS.items()
        if all(f"megallm::{part}" in known and has(f"megallm::{part}", key) for part in parts)
    )


# Decided at import, so that a traced function sees a constant.
NATIVE = load(os.environ.get("MEGALLM_OPS") or "auto")


def register_fakes(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Tells torch the shapes that compiled operators return, for tracing; those that are not built are left out."""
    for name, function in functions.items():
        if hasattr(torch.ops.megallm, name):
            torch.library.register_fake(f"megallm::{name}", function)


def apex_norms() -> Any:
    """apex's functions of norms. (The package of that name on PyPI is another one.)"""
    return importlib.import_module("apex.normalization.fused_layer_norm")


def other_library(name: str) -> bool:
    """Whether torch or apex is there, the one with the norms."""
    module = {"torch": "torch", "apex": "apex.normalization"}[name]
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def check_choices(choices: OperatorChoices, device: torch.device) -> None:
    """Raises ValueError with a sentence where this machine does not have what was chosen for the operators."""
    probe = torch.empty(0, device=device)
    for operator in OPERATORS:
        choice = choices.of(operator)
        if choice == "native":
            try:
                NATIVE.serves(operator, probe, choice)
            except RuntimeError as error:
                why = NATIVE.reason if not NATIVE.loaded else f"built for {_what_is_built()}"
                raise ValueError(f"--ops: {error} ({why}); build it with pip install ., or use --ops auto") from error
        elif choice in OTHERS and not other_library(choice):
            raise ValueError(f"--ops: {choice} was asked for {operator}, but is not installed here; use --ops auto")


def operators_in_use(choices: OperatorChoices, device: torch.device) -> list[str]:
    """Words for --ops that leave nothing open: for each operator what `choices` come to on a device of this machine."""
    words, probe = [], torch.empty(0, device=device)
    for operator in OPERATORS:
        choice = choices.of(operator)
        if choice not in OTHERS:
            choice = "native" if NATIVE.serves(operator, probe, choice) else "reference"
        words.append(f"{operator}={choice}")
    return words


def _what_is_built() -> str:
    return f"CPU and CUDA {', '.join(NATIVE.cuda_architectures)}" if NATIVE.cuda_architectures else "CPU"
