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


def told_by_the_first(mesh: Mesh | Hosts, function: Callable[[], str]) -> str:
    """The text that `function` gives on the first rank, which alone calls it. Raises ValueError as `on_every_rank`."""
    world = mesh.world
    encoded = on_every_rank(mesh, lambda: function().encode() if world.rank == 0 else b"")
    length = torch.tensor([len(encoded)], dtype=torch.int64, device=mesh.device)
    world.broadcast(length, 0)
    text = torch.zeros(int(length.item()), dtype=torch.uint8, device=mesh.device)
    if world.rank == 0:
        text.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    world.broadcast(text, 0)
    return bytes(text.tolist()).decode()
