"""A mistake that only one node can see, such as a missing file, must end all ranks alike.

A rank that left would hang the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from megallm.mesh import Hosts, Mesh

Result = TypeVar("Result")

_MESSAGE_BYTES = 4096


def on_every_rank(mesh: Mesh | Hosts, function: Callable[[], Result]) -> Result:
    """Calls `function` on all ranks and returns its result where it succeeded everywhere.

    Raises ValueError on all ranks, with the message of the lowest rank that failed with a ValueError or OSError.
    """
    result, message = None, None
    try:
        result = function()
    except (ValueError, OSError) as error:
        message = str(error)
    world = mesh.world
    failing = torch.tensor([-1.0 if message is None else float(world.size - world.rank)], device=mesh.device)
    world.all_reduce(failing, "max")
    if failing.item() < 0:
        return result  # type: ignore[return-value]
    first = world.size - int(failing.item())
    text = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=mesh.device)
    if world.rank == first and message is not None:
        encoded = message.encode()[:_MESSAGE_BYTES]
        text[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    world.broadcast(text, first)
    raise ValueError(bytes(text.tolist()).rstrip(b"\0").decode(errors="replace"))
