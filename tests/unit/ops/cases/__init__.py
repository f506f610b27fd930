"""Every native operator's cases, a module for each operator: its `CASES`."""

import importlib
import pkgutil

from tests.unit.ops.accuracy import Case

CASES: list[Case] = [
    case
    for module in pkgutil.iter_modules(__path__)
    for case in importlib.import_module(f"{__name__}.{module.name}").CASES
]
