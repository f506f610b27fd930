"""The compiled operators: loaded once, when this module is imported, and used wherever they apply.

`MEGALLM_OPS=reference` leaves them unused, for debugging; `MEGALLM_OPS=native` makes their absence an error. Otherwise
a missing library is reported once and every operator runs its reference in plain torch: the same results up to
rounding, slower.
"""

import importlib
import logging
import os
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NativeLibrary:
    """What the compiled library offers to this process.

    `reason` says why it is not in use, and is empty when it is. `cuda_architectures` are the GPU architectures it was
    compiled for, for example `("8.0", "9.0+PTX")`; empty when it was compiled without CUDA.
    """

    loaded: bool
    cuda_architectures: tuple[str, ...]
    reason: str

    @property
    def in_use(self) -> bool:
        return self.loaded and not self.reason

    def serves(self, tensor: torch.Tensor) -> bool:
        """Whether the native operators run on this tensor's device."""
        if not self.in_use:
            return False
        if tensor.device.type == "cpu":
            return True
        return tensor.device.type == "cuda" and self.covers(torch.cuda.get_device_capability(tensor.device))

    def covers(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run one of the compiled architectures.

        Compiled code runs on its own major version, from its minor version on; PTX is translated for everything newer.
        """
        return any(_covers(architecture, capability) for architecture in self.cuda_architectures)


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

    `choice` is "auto", "native" (its absence raises ImportError) or "reference" (loaded all the same, for comparison,
    but not used). Raises ValueError for anything else.
    """
    if choice not in ("auto", "native", "reference"):
        raise ValueError(f"MEGALLM_OPS={choice!r} is not known: use auto, native or reference.")
    try:
        extension = importlib.import_module("megallm._C")
    except ImportError as error:
        reason = f"the compiled library is not there ({error})"
        if choice == "native":
            raise ImportError(f"MEGALLM_OPS=native, but {reason}. Build it with: pip install .") from error
        if choice == "auto" and os.environ.get("LOCAL_RANK", "0") == "0":
            logging.getLogger("megallm").warning(
                "Native operators are not in use: %s. Everything works without them, slower.", reason
            )
        return NativeLibrary(loaded=False, cuda_architectures=(), reason=reason)
    architectures = tuple(filter(None, re.split(r"[; ]+", extension.cuda_architectures)))
    reason = "MEGALLM_OPS=reference" if choice == "reference" else ""
    return NativeLibrary(loaded=True, cuda_architectures=architectures, reason=reason)


# Decided at import, so that a traced function sees a constant.
NATIVE = load(os.environ.get("MEGALLM_OPS") or "auto")
