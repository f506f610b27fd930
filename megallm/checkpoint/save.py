"""Saving: each rank writes its boxes, then one rank commits the folder by renaming it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from megallm.checkpoint.boxes import LocalBox
from megallm.mesh import Mesh

FORMAT = "megallm sharded checkpoint 0"
MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
# What a run needs from the manifest to go on; the first three are written here, the others come with the state.
MANIFEST_KEYS = (
    "format",
    "iteration",
    "num_files",
    "consumed_samples",
    "consumed_valid_samples",
    "position",
    "num_updates",
    "config",
)


def checkpoint_folder(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lives."""
    return Path(root) / f"iter_{iteration:07d}"


def save_checkpoint(root: str, iteration: int, boxes: Iterable[LocalBox], state: dict[str, Any], mesh: Mesh) -> Path:
    """Writes a checkpoint. Called by all ranks; returns when it is committed.

    A folder with its final name is complete: files are written in a temporary folder beside it, which is renamed when
    every rank is done.
    """
    final = checkpoint_folder(root, iteration)
    temporary = final.with_name(final.name + ".tmp")
    if mesh.rank == 0 and temporary.exists():
        # A save that did not end may have left files of ranks that this job does not have.
        _remove(temporary)
    mesh.world.barrier()
    temporary.mkdir(parents=True, exist_ok=True)
    # Boxes are views of larger tensors, which the writer refuses; a copy stands alone.
    tensors = {box.key: box.tensor.detach().cpu().clone() for box in boxes if box.saves}
    file = temporary / f"rank_{mesh.rank:05d}.safetensors"
    save_file(tensors, file)
    _flush(file)
    mesh.world.barrier()
    if mesh.rank == 0:
        manifest = {"format": FORMAT, "iteration": iteration, "num_files": mesh.shape.world_size, **state}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _flush(temporary / MANIFEST)
        _flush(temporary)
        if final.exists():
            _remove(final)
        os.replace(temporary, final)
        tracker = Path(root) / (TRACKER + ".tmp")
        tracker.write_text(str(iteration))
        _flush(tracker)
        os.replace(tracker, Path(root) / TRACKER)
        _flush(Path(root))
    mesh.world.barrier()
    return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
