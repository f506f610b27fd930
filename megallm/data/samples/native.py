"""The compiled loops of this folder, or None where they were not built: each caller then takes its numpy reference."""

import warnings
from importlib import import_module
from types import ModuleType

functions: ModuleType | None
try:
    functions = import_module("megallm.data.samples._helpers")
except ImportError:
    functions = None
    warnings.warn(
        "megallm.data.samples._helpers is not built: samples are found and read in numpy, slower. "
        "`pip install -e .` builds it.",
        stacklevel=2,
    )
