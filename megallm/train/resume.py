"""What a checkpoint holds besides tensors, and how an engine takes it up again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from megallm.agreement import on_every_rank
from megallm.checkpoint.boxes import local_boxes, weight_boxes
from megallm.checkpoint.commit import TRACKER
from megallm.checkpoint.load import check_files, find_checkpoints, load_boxes
from megallm.checkpoint.manifest import DamagedError, Manifest, digest, read_manifest
from megallm.config import difference, from_dict
from megallm.config.tree import Config
from megallm.mesh import Mesh
from megallm.train.data_order import check_data_order
from megallm.train.engine import Engine, Model

# What a run needs to go on besides tensors.
_STATE = ("consumed_samples", "consumed_valid_samples", "position", "num_updates", "config", "data_order")
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


class Loaded(NamedTuple):
    """What a run continues from: the folder, and sentences that its user should read."""

    folder: Path
    notes: list[str]


def load_engine(engine: Engine, root: str, order: dict[str, str] | None = None) -> Loaded | None:
    """Continues from a checkpoint under `root`, saved under any layout: the newest, or that of --ckpt-step.

    Returns None if there is none. With --allow-fallback the one before takes the place of one that is damaged.

    Raises ValueError, on all ranks alike, if the checkpoint is of another model, damaged, or not seen by every rank, or
    if its run read the data in another `order` and the configuration does not allow that.
    """
    settings = engine.config.checkpoint
    folders = _seen_by_all(engine.mesh, root, settings.ckpt_step)
    notes = _note_on_tracker(root, folders)
    for number, folder in enumerate(folders):
        try:
            manifest = _read_undamaged(engine, folder, order)
        except DamagedError as error:
            if number + 1 == len(folders):
                raise
            older = folders[number + 1]
            if not settings.allow_fallback:
                raise ValueError(f"{error}. --allow-fallback continues from {older.name} instead") from None
            notes.append(f"{error}. Going back to {older.name}, as --allow-fallback says")
            continue
        _take_up(engine, manifest)
        changes = _changes(from_dict(manifest.state["config"]), engine.config)
        return Loaded(folder, notes + [f"changed since it was saved: {change}" for change in changes])
    return None


def _read_undamaged(engine: Engine, folder: Path, order: dict[str, str] | None) -> Manifest:
    """Fill the engine's tensors from a checkpoint. Raises DamagedError on all ranks where one found it damaged."""
    boxes = local_boxes(engine.optimizer, engine.chunks, engine.mesh)

    def read() -> Manifest | DamagedError:
        try:
            manifest = _read_manifest(folder)
            _check_same_model(folder, from_dict(manifest.state["config"]), engine.config)
            saved_order = manifest.state["data_order"]
            if order and saved_order and not engine.config.checkpoint.allow_data_change:
                check_data_order(saved_order, order, str(folder))
            # Between them the ranks look at every file, also at those that hold nothing they need.
            check_files(folder, manifest.files[engine.mesh.rank :: engine.mesh.shape.world_size])
            load_boxes(folder, manifest, boxes)
        except DamagedError as error:
            return error
        return manifest

    result = on_every_rank(engine.mesh, read)

    def raise_damage() -> Manifest:
        if isinstance(result, DamagedError):
            raise result
        return result

    try:
        return on_every_rank(engine.mesh, raise_damage)
    except ValueError as error:
        raise DamagedError(str(error)) from None


def _read_manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    missing = [key for key in _STATE if key not in manifest.state]
    if missing:
        raise DamagedError(f"the manifest of {folder} lacks {', '.join(missing)}")
    return manifest


def _take_up(engine: Engine, manifest: Manifest) -> None:
    """Continue with the tensors that were filled, and with the counters of a checkpoint."""
    engine.optimizer.publish_weights()
    engine.reducer.finish_gather()
    progress, state = engine.progress, manifest.state
    progress.iteration = manifest.iteration
    progress.consumed_samples = state["consumed_samples"]
    progress.consumed_valid_samples = state["consumed_valid_samples"]
    progress.evaluation_due = bool(state.get("evaluation_due"))
    progress.position.fill_(state["position"])
    progress.num_updates.fill_(state["num_updates"])
    # Checkpoints of older versions do not have it.
    engine.optimizer.loss_scale.load_state(state.get("loss_scale", {}))
    for shard in engine.optimizer.shards:
        shard.state.num_updates.fill_(state["num_updates"])


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

    Raises ValueError if the checkpoint is of another model or damaged.
    """
    boxes = weight_boxes(model.chunks, model.mesh)
    on_every_rank(model.mesh, lambda: load_boxes(folder, read_manifest(folder), boxes))


def _seen_by_all(mesh: Mesh, root: str, iteration: int | None) -> list[Path]:
    """The checkpoints under `root`, the newest first, or that of one iteration.

    Raises ValueError where ranks see different ones: some would continue and the others start afresh.
    """
    folders = on_every_rank(mesh, lambda: find_checkpoints(root, iteration))
    newest = int(re.sub(r"\D", "", folders[0].name) or 0) if folders else -1
    names = int(digest(" ".join(folder.name for folder in folders).encode()), 16) >> 1
    extremes = torch.tensor([newest, -newest, names, -names], dtype=torch.int64, device=mesh.device)
    mesh.world.all_reduce(extremes, "max")
    newest, oldest, highest, lowest = int(extremes[0]), -int(extremes[1]), int(extremes[2]), -int(extremes[3])
    if newest != oldest:
        others = "none" if oldest < 0 else f"that of iteration {oldest}"
        raise ValueError(
            f"--load {root}: some processes find the checkpoint of iteration {newest} there and others {others}; "
            "the folder must be one that all machines share"
        )
    if highest != lowest:
        raise ValueError(
            f"--load {root}: processes find different checkpoints there; all machines must share the folder"
        )
    return folders


def _note_on_tracker(root: str, folders: list[Path]) -> list[str]:
    """Somebody may have written an earlier iteration into the tracker file to go back to it."""
    tracker = Path(root) / TRACKER
    if len(folders) < 2 or not tracker.exists():
        return []
    named = tracker.read_text(errors="replace").strip()
    if named.isdigit() and any(int(named) == int(re.sub(r"\D", "", folder.name)) for folder in folders[1:]):
        return [f"{TRACKER} names {named}, which is not the newest: --ckpt-step {named} continues from there"]
    return []


def _check_same_model(folder: Path, saved: Config, wanted: Config) -> None:
    """Raises ValueError with every setting in which the saved model is another."""
    pairs = {name: (getattr(saved.model, name), getattr(wanted.model, name)) for name in _MODEL_SHAPE}
    changed = [f"{name} is {there!r} there and {here!r} here" for name, (there, here) in pairs.items() if there != here]
    if changed:
        raise ValueError(
            f"{folder} was saved from another model: {'; '.join(changed)}. Give the flags of the run that saved it."
        )
