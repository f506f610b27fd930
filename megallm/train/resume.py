"""What a checkpoint holds besides tensors, and how an engine takes it up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megallm.checkpoint.boxes import local_boxes, weight_boxes
from megallm.checkpoint.load import find_checkpoint, load_boxes, read_manifest
from megallm.checkpoint.save import save_checkpoint
from megallm.config import to_dict
from megallm.train.agreement import on_every_rank
from megallm.train.engine import Engine, Model


def save_engine(engine: Engine, root: str) -> Path:
    """Saves weights, optimizer and progress. Called by all ranks."""
    engine.reducer.finish_gather()
    progress = engine.progress
    state = {
        "consumed_samples": progress.consumed_samples,
        "consumed_valid_samples": progress.consumed_valid_samples,
        "position": float(progress.position),
        "num_updates": float(progress.num_updates),
        "config": to_dict(engine.config),
    }
    boxes = local_boxes(engine.optimizer, engine.chunks, engine.mesh)
    return save_checkpoint(root, progress.iteration, boxes, state, engine.mesh)


def load_engine(engine: Engine, root: str) -> Path | None:
    """Continues from the newest checkpoint under `root`, saved under any layout. Returns its folder, or None if there
    is none.

    Raises ValueError if the checkpoint is of another model or incomplete.
    """
    folder = find_checkpoint(root)
    if folder is None:
        return None

    def read() -> dict[str, Any]:
        load_boxes(folder, local_boxes(engine.optimizer, engine.chunks, engine.mesh))
        return read_manifest(folder)

    manifest = on_every_rank(engine.mesh, read)
    engine.optimizer.publish_weights()
    engine.reducer.finish_gather()
    progress = engine.progress
    progress.iteration = manifest["iteration"]
    progress.consumed_samples = manifest["consumed_samples"]
    progress.consumed_valid_samples = manifest["consumed_valid_samples"]
    progress.position.fill_(manifest["position"])
    progress.num_updates.fill_(manifest["num_updates"])
    for shard in engine.optimizer.shards:
        shard.state.num_updates.fill_(manifest["num_updates"])
    return folder


def load_weights(model: Model, folder: Path) -> None:
    """Fills a model's parameters, without optimizer state, from a checkpoint saved under any layout.

    Raises ValueError if the checkpoint is of another model or incomplete.
    """
    on_every_rank(model.mesh, lambda: load_boxes(folder, weight_boxes(model.chunks, model.mesh)))
