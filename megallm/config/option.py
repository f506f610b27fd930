"""How a field of the configuration is written down."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(
    default: Any, flag: str, help: str, *, choices: tuple[Any, ...] | None = None, off_flag: str | None = None
) -> Any:
    """A field of the tree with its flag.

    `off_flag` names the switch that turns a boolean off whose default is on. A list default makes the flag take
    several values.
    """
    metadata = {"flag": flag, "help": help, "choices": choices, "off_flag": off_flag}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
