"""Saving: each rank writes its boxes, then one rank commits the folder by renaming it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from megallm.agreement import on_every_rank
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

    Raises ValueError on all ranks, naming the file, if one of them cannot write.

    A folder with its final name is complete: files are written in a temporary folder beside it, which is renamed when
    every rank is done.
    """
    final = checkpoint_folder(root, iteration)
    temporary = final.with_name(final.name + ".tmp")
    on_every_rank(mesh, lambda: _prepare(temporary) if mesh.rank == 0 else None)
    on_every_rank(mesh, lambda: _write(temporary, boxes, mesh.rank))
    manifest = {"format": FORMAT, "iteration": iteration, "num_files": mesh.shape.world_size, **state}
    on_every_rank(mesh, lambda: _commit(temporary, final, manifest) if mesh.rank == 0 else None)
    return final


def _prepare(temporary: Path) -> None:
    # A save that did not end may have left files of ranks that this job does not have.
    if temporary.exists():
        _remove(temporary)
    temporary.mkdir(parents=True)


def _write(temporary: Path, boxes: Iterable[LocalBox], rank: int) -> None:
    # Boxes are views of larger tensors, which the writer refuses; a copy stands alone.
    tensors = {box.key: box.tensor.detach().cpu().clone() for box in boxes if box.saves}
    file = temporary / f"rank_{rank:05d}.safetensors"
    # Where machines share no folder, only the first one has made it.
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise ValueError(f"{file} could not be written: {error}") from error
    _flush(file)


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    written = len(list(temporary.glob("rank_*.safetensors")))
    if written != manifest["num_files"]:
        raise ValueError(
            f"{temporary} holds {written} of the {manifest['num_files']} ranks' files: --save must be a folder "
            "that all machines share"
        )
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(temporary / MANIFEST)
    _flush(temporary)
    replaced = final.with_name(final.name + ".old")
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    if replaced.exists():
        _remove(replaced)
    tracker = final.parent / (TRACKER + ".tmp")
    tracker.write_text(str(manifest["iteration"]))
    _flush(tracker)
    os.replace(tracker, final.parent / TRACKER)
    _flush(final.parent)


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
