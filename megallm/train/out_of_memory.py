"""Out of memory: what was predicted, what takes most, and what would fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megallm.config.tree import Config
from megallm.mesh import Mesh
from megallm.plan.alternatives import changes_that_fit
from megallm.plan.gpus import DEFAULT_GPU, GPUS, SAFE_SHARE
from megallm.plan.plan import Plan, make_plan
from megallm.plan.report import gib, table
from megallm.train.prediction import layout_here

# Where memory ran out below the share that is known to be safe, what is to fit must need clearly less.
_CLEARLY_LESS = 0.9
_CPU_LACKS = "DefaultCPUAllocator: can't allocate memory"


@contextmanager
def out_of_memory_explained(config: Config, mesh: Mesh) -> Iterator[None]:
    """Raises ValueError with an explanation in the place of torch's error for want of memory, on the rank that lacks
    it. `config` is resolved."""
    try:
        yield
    except RuntimeError as error:
        # For a GPU torch has an error of its own; what is missing to a CPU is told by this text alone.
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_LACKS not in str(error):
            raise
        first_line = str(error).splitlines()[0] if str(error) else "out of memory"
        first_line = first_line[max(0, first_line.find(_CPU_LACKS)) :]
        raise ValueError(f"rank {mesh.rank}: {first_line}\n{explanation(config, mesh)}") from error


def explanation(config: Config, mesh: Mesh) -> str:
    """What was predicted for this rank by kind, largest first, and changes that would fit."""
    memory, share = _memory_of_rank(mesh.device)
    plan = make_plan(layout_here(config, mesh), GPUS[DEFAULT_GPU])
    kinds = plan.memory[mesh.coordinates["pp"]]
    predicted = sum(kinds.values())
    largest = sorted(kinds.items(), key=lambda kind: -kind[1])[:3]
    lines = [
        f"predicted for this rank: {gib(predicted)} of {gib(memory)}{share}; the largest kinds are "
        + ", ".join(f"{name} {gib(size)}" for name, size in largest)
    ]
    changes = _changes(plan, memory)
    if not changes:
        lines.append("no one or two changes of the layout would do: take more or larger GPUs, or a smaller model")
    else:
        lines.append("what would fit:")
        lines += [f"  {line}" for line in table(changes, "<<<")]
    return "\n".join(lines)


def _memory_of_rank(device: torch.device) -> tuple[int, str]:
    """Bytes that are there for this rank, and words on what they are a share of, if of anything."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1:
        return memory, ""
    return memory // processes, f", its share of the {gib(memory)} that {processes} processes have on this machine"


def _changes(plan: Plan, memory: int) -> list[tuple[str, str, str]]:
    """Flags, the predicted bytes, and how much longer a step takes."""
    less = plan.peak * _CLEARLY_LESS / SAFE_SHARE
    bound = int(min(memory, less))
    return [
        (" ".join(change.flags), gib(change.plan.peak), f"{change.plan.step.total / plan.step.total:.2f} x the time")
        for change in changes_that_fit(plan, memory=bound)
    ]
