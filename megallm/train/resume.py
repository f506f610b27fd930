"""What a checkpoint holds besides tensors, and how an engine takes it up again."""

from __future__ import annotations

from pathlib import Path

from megallm.checkpoint.boxes import local_boxes
from megallm.checkpoint.load import find_checkpoint, load_boxes, read_manifest
from megallm.checkpoint.save import save_checkpoint
from megallm.config import to_dict
from megallm.train.engine import Engine


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
    """Continues from the newest checkpoint under `root`, saved under any layout. Returns its folder, or None if there is none.

    Raises ValueError if the checkpoint is of another model or incomplete.
    """
    folder = find_checkpoint(root)
    if folder is None:
        return None
    manifest = read_manifest(folder)
    load_boxes(folder, local_boxes(engine.optimizer, engine.chunks, engine.mesh))
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
