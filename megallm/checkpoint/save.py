"""Saving: each rank writes its boxes, then one rank commits the folder by renaming it and removes what is surplus."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megallm.agreement import on_every_rank
from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.commit import begin, checkpoint_folder, commit, temporary_folder, write_rank
from megallm.checkpoint.retention import Retention, prune
from megallm.checkpoint.shard_file import size_of
from megallm.mesh import Hosts, Mesh

_KEEP_ALL = Retention()


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk: its folder, its step, the bytes of all ranks' files, and what went wrong
    besides.
    """

    folder: Path
    iteration: int
    num_bytes: int
    notes: tuple[str, ...] = ()


def save_checkpoint(
    root: str,
    iteration: int,
    boxes: Sequence[LocalBox],
    state: dict[str, Any],
    mesh: Mesh | Hosts,
    retention: Retention = _KEEP_ALL,
) -> Saved:
    """Writes a checkpoint of the boxes that this rank saves.

    Called by all ranks; returns when it is committed and on the disk, and older ones that `retention` gives up are
    gone.

    Raises ValueError on all ranks, naming the file and what was needed, if one of them cannot write. Nothing of the
    attempt is left then, and earlier checkpoints stay.
    """
    world = mesh.world
    final, token = checkpoint_folder(root, iteration), _same_token(mesh)
    temporary = temporary_folder(final, token)
    needed = _sum_over_ranks(size_of(boxes), mesh)
    notes: tuple[str, ...] = ()
    try:
        notes += on_every_rank(mesh, lambda: begin(temporary, needed) if world.rank == 0 else ())
        on_every_rank(mesh, lambda: write_rank(temporary, boxes, world.rank))
        notes += on_every_rank(
            mesh, lambda: commit(temporary, final, iteration, token, state, world.size) if world.rank == 0 else ()
        )
    except ValueError as error:
        # What was renamed before a later step failed is a whole checkpoint and stays. All ranks have stopped writing,
        # and where machines share no folder each has one of its own.
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"the checkpoint {final} cannot be saved: {error}") from None
    if world.rank == 0:
        notes += prune(root, retention, iteration, token)
    return Saved(final, iteration, needed, notes)


def save_stream(
    root: str,
    iteration: int,
    files: Sequence[Sequence[LocalBox]],
    tensors: Iterable[torch.Tensor],
    state: dict[str, Any],
) -> Saved:
    """Writes a checkpoint in this process alone, of tensors that are made one after another while it is written.

    `files`, of boxes made by `declared_box`, say what will come, in the order in which it comes: each box is a whole
    tensor or a part of one, and together they are all of each. `state` needs the configuration under `config`; without
    moments of the optimizer nothing else is needed, and a run starts from the weights.

    Raises ValueError if it cannot be written, or if `tensors` raises one. Nothing is left then.
    """
    final, token = checkpoint_folder(root, iteration), secrets.token_hex(8)
    temporary = temporary_folder(final, token)
    needed = sum(size_of(boxes) for boxes in files)
    in_order = iter(tensors)
    try:
        notes = begin(temporary, needed)
        for number, boxes in enumerate(files):
            write_rank(temporary, boxes, number, islice(in_order, len(boxes)))
        notes += commit(temporary, final, iteration, token, state, len(files))
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, ValueError | OSError):
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"the checkpoint {final} cannot be saved: {reason}") from None
        raise
    return Saved(final, iteration, needed, notes)


def _same_token(mesh: Mesh | Hosts) -> str:
    """A name for this save, drawn by one rank."""
    drawn = torch.tensor([secrets.randbits(62) if mesh.world.rank == 0 else 0], dtype=torch.int64, device=mesh.device)
    mesh.world.broadcast(drawn, 0)
    return f"{int(drawn):016x}"


def _sum_over_ranks(number: int, mesh: Mesh | Hosts) -> int:
    total = torch.tensor([number], dtype=torch.int64, device=mesh.device)
    mesh.world.all_reduce(total)
    return int(total)
