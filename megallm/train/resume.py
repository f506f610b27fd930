"""What a checkpoint holds besides tensors, and how an engine takes it up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megallm.agreement import on_every_rank
from megallm.checkpoint.boxes import local_boxes, weight_boxes
from megallm.checkpoint.load import find_checkpoint, load_boxes, read_manifest
from megallm.checkpoint.save import save_checkpoint
from megallm.config import difference, from_dict, to_dict
from megallm.config.tree import Config
from megallm.mesh import Mesh
from megallm.train.data_order import check_data_order
from megallm.train.engine import Engine, Model

# Settings that make the weights mean something else. Shapes alone do not tell: a model of fewer layers, or with another
# activation, would load without a word.
_MODEL_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "position_embedding_type",
    "rotary_base",
    "normalization",
    "norm_epsilon",
    "activation",
    "add_bias_linear",
    "add_qkv_bias",
    "tie_embeddings",
    "vocab_size",
)


def save_engine(engine: Engine, root: str, order: dict[str, str] | None = None) -> Path:
    """Saves weights, optimizer, progress and what the order of the data depends on. Called by all ranks."""
    engine.reducer.finish_gather()
    progress = engine.progress
    state = {
        "consumed_samples": progress.consumed_samples,
        "consumed_valid_samples": progress.consumed_valid_samples,
        "position": float(progress.position),
        "num_updates": float(progress.num_updates),
        "config": to_dict(engine.config),
        "data_order": order or {},
    }
    boxes = local_boxes(engine.optimizer, engine.chunks, engine.mesh)
    return save_checkpoint(root, progress.iteration, boxes, state, engine.mesh)


def load_engine(engine: Engine, root: str, order: dict[str, str] | None = None) -> tuple[Path, list[str]] | None:
    """Continues from the newest checkpoint under `root`, saved under any layout.

    Returns its folder and what differs from the run that saved it apart from the layout, or None if there is none.

    Raises ValueError, on all ranks alike, if the checkpoint is of another model, damaged, or not seen by every rank, or
    if its run read the data in another `order` and the configuration does not allow that.
    """
    folder = _checkpoint_seen_by_all(engine.mesh, root)
    if folder is None:
        return None

    def read() -> dict[str, Any]:
        manifest = read_manifest(folder)
        _check_same_model(folder, from_dict(manifest["config"]), engine.config)
        saved_order = manifest.get("data_order")
        if order and saved_order and not engine.config.checkpoint.allow_data_change:
            check_data_order(saved_order, order, str(folder))
        load_boxes(folder, local_boxes(engine.optimizer, engine.chunks, engine.mesh))
        return manifest

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
    return folder, _changes(from_dict(manifest["config"]), engine.config)


def _changes(saved: Config, now: Config) -> list[str]:
    """Settings that bear on the numbers or on the order of the data, as `name: old -> new`."""
    bearing = ("model.", "training.", "optimizer.", "data.")
    silent = ("training.micro_batch_size", "training.device", "training.exit_interval", "data.num_workers")
    return [
        f"{path}: {old} -> {new}"
        for path, old, new in difference(saved, now)
        if path.startswith(bearing) and path not in silent
    ]


def load_weights(model: Model, folder: Path) -> None:
    """Fills a model's parameters, without optimizer state, from a checkpoint saved under any layout.

    Raises ValueError if the checkpoint is of another model or incomplete.
    """
    on_every_rank(model.mesh, lambda: load_boxes(folder, weight_boxes(model.chunks, model.mesh)))


def _checkpoint_seen_by_all(mesh: Mesh, root: str) -> Path | None:
    """The newest complete checkpoint under `root`.

    Raises ValueError where ranks see different ones: some would continue and the others start afresh.
    """
    folder = find_checkpoint(root)
    iteration = on_every_rank(mesh, lambda: -1 if folder is None else int(read_manifest(folder)["iteration"]))
    extremes = torch.tensor([iteration, -iteration], dtype=torch.int64, device=mesh.device)
    mesh.world.all_reduce(extremes, "max")
    newest, oldest = int(extremes[0]), -int(extremes[1])
    if newest != oldest:
        others = "none" if oldest < 0 else f"that of iteration {oldest}"
        raise ValueError(
            f"--load {root}: some processes find the checkpoint of iteration {newest} there and others {others}; "
            "the folder must be one that all machines share"
        )
    return folder


def _check_same_model(folder: Path, saved: Config, wanted: Config) -> None:
    """Raises ValueError with every setting in which the saved model is another."""
    pairs = {name: (getattr(saved.model, name), getattr(wanted.model, name)) for name in _MODEL_SHAPE}
    changed = [f"{name} is {there!r} there and {here!r} here" for name, (there, here) in pairs.items() if there != here]
    if changed:
        raise ValueError(
            f"{folder} was saved from another model: {'; '.join(changed)}. Give the flags of the run that saved it."
        )
