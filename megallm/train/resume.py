"""What a checkpoint holds besides tensors, and how an engine takes it up again."""

from __future__ import annotations

import math
import re
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megallm.agreement import on_every_rank
from megallm.checkpoint.boxes import WEIGHTS, local_boxes, weight_boxes
from megallm.checkpoint.commit import TRACKER
from megallm.checkpoint.load import check_files, find_checkpoints, load_boxes, newest_sound
from megallm.checkpoint.manifest import DamagedError, Manifest, digest, read_manifest
from megallm.config import from_dict
from megallm.config.tree import CheckpointConfig, Config
from megallm.mesh import Mesh
from megallm.optimizer.rates import RateSchedules
from megallm.train.changes import changes, check_architecture, check_same_model
from megallm.train.data_order import check_data_order
from megallm.train.engine import Engine, Model

# What a run needs to go on besides tensors.
_COUNTS = ("consumed_samples", "consumed_valid_samples")
_NUMBERS = ("position", "num_updates")


class TakenUp(Enum):
    """What of a checkpoint a run takes up."""

    ALL = "continuing from"
    ALL_BUT_OPTIMIZER = "continuing with a new optimizer and a new schedule of the learning rate from"
    WEIGHTS = "a new run begins with the weights of"


class Loaded(NamedTuple):
    """What a run continues from: the folder, what of it, and sentences that its user should read."""

    folder: Path
    notes: list[str]
    taken_up: TakenUp = TakenUp.ALL


def take_up(engine: Engine, order: dict[str, str] | None = None) -> Loaded | None:
    """Continues from --load, or where that holds no checkpoint, begins with the weights of --pretrained-checkpoint or
    of --load-hf.

    Returns None where there is nothing to take up. Raises ValueError, on all ranks alike, where that is not allowed, or
    as `load_engine` does.
    """
    settings = engine.config.checkpoint
    loaded = load_engine(engine, settings.load, order) if settings.load else None
    if loaded is None and settings.pretrained_checkpoint:
        loaded = load_engine(engine, settings.pretrained_checkpoint, order, TakenUp.WEIGHTS)
        if loaded is None:
            raise ValueError(f"--pretrained-checkpoint {settings.pretrained_checkpoint} holds no checkpoint")
    if loaded is None and settings.load_hf:
        from megallm.train.hugging_face import begin_with

        notes = begin_with(engine, settings.load_hf)
        loaded = Loaded(Path(settings.load_hf), notes, TakenUp.WEIGHTS)
    if loaded is None and (settings.finetune or settings.exit_on_missing_checkpoint):
        flag = "--finetune" if settings.finetune else "--exit-on-missing-checkpoint"
        raise ValueError(f"--load {settings.load} holds no checkpoint, and {flag} allows no start without one")
    return loaded


def load_engine(
    engine: Engine, root: str, order: dict[str, str] | None = None, taken_up: TakenUp | None = None
) -> Loaded | None:
    """Continues from a checkpoint under `root`, saved under any layout: the newest, or that of --ckpt-step.

    With `taken_up` given, that much of the newest, whatever the configuration says. Returns None if there is no
    checkpoint. With --allow-fallback the one before takes the place of one that is damaged.

    Raises ValueError, on all ranks alike, if the checkpoint is of another model, damaged, or not seen by every rank, or
    if its run read the data in another `order` and the configuration does not allow that.
    """
    settings, iteration = engine.config.checkpoint, None
    if taken_up is None:
        taken_up, iteration = wanted_of(settings), settings.ckpt_step
    folders = _seen_by_all(engine.mesh, root, iteration)
    if not folders:
        return None
    notes = _note_on_tracker(root, folders)
    folder, manifest, told = newest_sound(
        folders, settings.allow_fallback, lambda folder: _read_undamaged(engine, folder, order, taken_up)
    )
    notes += told
    _publish(engine, manifest, taken_up)
    saved, made_by = saved_config(folder, manifest), manifest.state.get("saved")
    differences = changes(saved, made_by, engine.config, engine.mesh.shape.world_size)
    notes += [f"changed since it was saved: {change}" for change in differences]
    if _takes_rates(engine, taken_up):
        notes.append("learning rate and weight decay go on as they were, whatever has changed in their flags")
    return Loaded(folder, notes, taken_up)


def origin_of(settings: CheckpointConfig) -> tuple[TakenUp, list[Path]]:
    """What of which checkpoints a run takes up, the newest first: of --load, or else of --pretrained-checkpoint.

    None where neither holds any. For this process alone; raises ValueError as `find_checkpoints` does.
    """
    folders = find_checkpoints(settings.load, settings.ckpt_step) if settings.load else []
    if folders or not settings.pretrained_checkpoint:
        return wanted_of(settings), folders
    return TakenUp.WEIGHTS, find_checkpoints(settings.pretrained_checkpoint)


def saved_config(folder: Path, manifest: Manifest) -> Config:
    """The configuration of the run that saved a checkpoint. Raises ValueError where this version cannot read it."""
    try:
        return from_dict(manifest.state["config"])
    except ValueError as error:
        raise ValueError(f"{folder} was saved by a version with other settings. {error}") from None


def load_weights(model: Model, folder: Path) -> None:
    """Fills a model's parameters, without optimizer state, from a checkpoint saved under any layout.

    Raises ValueError if the checkpoint is of another model or damaged.
    """
    boxes = weight_boxes(model.chunks, model.mesh)
    on_every_rank(model.mesh, lambda: load_boxes(folder, read_manifest(folder), boxes))


def wanted_of(settings: CheckpointConfig) -> TakenUp:
    """What --finetune and --no-load-optim say."""
    if settings.finetune:
        return TakenUp.WEIGHTS
    return TakenUp.ALL_BUT_OPTIMIZER if settings.no_load_optim else TakenUp.ALL


def _read_undamaged(engine: Engine, folder: Path, order: dict[str, str] | None, taken_up: TakenUp) -> Manifest:
    """Fill the engine's tensors from a checkpoint. Raises DamagedError on all ranks where one found it damaged."""
    boxes = list(local_boxes(engine.optimizer, engine.chunks, engine.mesh))
    if taken_up is not TakenUp.ALL:
        boxes = [box for box in boxes if box.kind == WEIGHTS]
    kinds = {box.kind for box in boxes}

    def read() -> Manifest | DamagedError:
        try:
            manifest = read_manifest(folder)
            check_kinds(folder, manifest, kinds)
            check_state(folder, manifest, taken_up)
            if _takes_rates(engine, taken_up):
                _saved_rates(folder, manifest)
            settings, saved = engine.config.checkpoint, saved_config(folder, manifest)
            check_architecture(folder, saved.model, engine.config.model)
            if not settings.allow_model_change:
                check_same_model(folder, saved, engine.config)
            saved_order = manifest.state.get("data_order")
            goes_on = taken_up is not TakenUp.WEIGHTS
            if goes_on and order and saved_order and not settings.allow_data_change:
                check_data_order(saved_order, order, str(folder))
            # Between them the ranks look at every file, also at those that hold nothing they need.
            check_files(folder, manifest.files[engine.mesh.rank :: engine.mesh.shape.world_size])
            load_boxes(folder, manifest, boxes)
        except DamagedError as error:
            return error
        return manifest

    result = on_every_rank(engine.mesh, read)
    _check_same_save(engine.mesh, folder, "" if isinstance(result, DamagedError) else result.token)

    def raise_damage() -> Manifest:
        if isinstance(result, DamagedError):
            raise result
        return result

    try:
        return on_every_rank(engine.mesh, raise_damage)
    except ValueError as error:
        raise DamagedError(str(error)) from None


def check_kinds(folder: Path, manifest: Manifest, wanted: set[str]) -> None:
    """Raises ValueError where a checkpoint holds nothing at all of something that is needed: it was saved without."""
    held = {name.partition("/")[0] for name in manifest.tensors}
    missing = sorted(wanted - held)
    if missing:
        goes_on = f", and --no-load-optim goes on at iteration {manifest.iteration} with a new optimizer"
        raise ValueError(
            f"{folder} holds {' and '.join(sorted(held)) or 'nothing'}, but no {' and no '.join(missing)}: --finetune "
            f"begins a new run with its weights{goes_on if 'consumed_samples' in manifest.state else ''}"
        )


def check_state(folder: Path, manifest: Manifest, taken_up: TakenUp) -> None:
    """Raises ValueError where a checkpoint lacks what is to be taken up, DamagedError where that is nonsense."""
    state = manifest.state
    if not isinstance(state.get("config"), dict):
        raise DamagedError(f"the manifest of {folder} lacks config")
    if taken_up is TakenUp.WEIGHTS:
        return
    if "consumed_samples" not in state:
        raise ValueError(f"{folder} does not say where its run was: --finetune begins a new one with its weights")
    kinds: dict[str, Any] = dict.fromkeys(_COUNTS, _is_count) | dict.fromkeys(_NUMBERS, _is_number)
    kinds |= {"data_order": _is_text_by_name, "loss_scale": _is_loss_scale}
    wrong = [key for key, is_sound in kinds.items() if not is_sound(state.get(key))]
    if wrong:
        raise DamagedError(f"the manifest of {folder} lacks {', '.join(wrong)}, or has nonsense there")


def _takes_rates(engine: Engine, taken_up: TakenUp) -> bool:
    return engine.config.optimizer.use_checkpoint_opt_param_scheduler and taken_up is TakenUp.ALL


def _saved_rates(folder: Path, manifest: Manifest) -> RateSchedules:
    """The schedules of a checkpoint. Raises ValueError where it has none, DamagedError where they are nonsense."""
    state = manifest.state.get("rates")
    if state is None:
        raise ValueError(
            f"{folder} was saved before checkpoints held the schedule of the learning rate: leave out "
            "--use-checkpoint-opt-param-scheduler and give the flags of that run"
        )
    try:
        return RateSchedules.from_state(state)
    except (KeyError, TypeError):
        raise DamagedError(f"the manifest of {folder} has nonsense for the schedule of the learning rate") from None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_text_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_loss_scale(value: object) -> bool:
    names = {"scale", "growth_tracker", "hysteresis_tracker"}
    if not isinstance(value, dict) or set(value) not in (set(), names):
        return False
    # The hysteresis goes below zero where one step after another is skipped.
    return all(_is_number(value[name]) or (name == "hysteresis_tracker" and _is_number(-value[name])) for name in value)


def _publish(engine: Engine, manifest: Manifest, taken_up: TakenUp) -> None:
    """Continue with the tensors that were filled, and with the counters of a checkpoint."""
    engine.optimizer.publish_weights()
    engine.reducer.finish_gather()
    progress, state = engine.progress, manifest.state
    if taken_up is TakenUp.WEIGHTS:
        return
    progress.iteration = manifest.iteration
    progress.consumed_samples = state["consumed_samples"]
    progress.consumed_valid_samples = state["consumed_valid_samples"]
    progress.evaluation_due = bool(state.get("evaluation_due"))
    if taken_up is TakenUp.ALL_BUT_OPTIMIZER:
        return
    progress.position.fill_(state["position"])
    progress.num_updates.fill_(state["num_updates"])
    engine.optimizer.loss_scale.load_state(state["loss_scale"])
    if _takes_rates(engine, taken_up):
        engine.rates = RateSchedules.from_state(state["rates"])
    for shard in engine.optimizer.shards:
        shard.state.num_updates.fill_(state["num_updates"])


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


def _check_same_save(mesh: Mesh, folder: Path, token: str) -> None:
    """Raises ValueError where ranks have read the manifests of different saves, as a file system may still show them.

    `token` is empty where a rank has found damage, which is told elsewhere.
    """
    mine = int(digest(token.encode()), 16) >> 1 if token else -1
    extremes = torch.tensor([mine, -mine if token else -(2**63) + 1], dtype=torch.int64, device=mesh.device)
    mesh.world.all_reduce(extremes, "max")
    if int(extremes[1]) != -(2**63) + 1 and int(extremes[0]) != -int(extremes[1]):
        raise ValueError(f"{folder}: processes find different saves there; all machines must share the folder")


def _note_on_tracker(root: str, folders: list[Path]) -> list[str]:
    """Somebody may have written an earlier iteration into the tracker file to go back to it."""
    tracker = Path(root) / TRACKER
    if len(folders) < 2 or not tracker.is_file():
        return []
    with open(tracker, "rb") as file:
        named = file.read(32).decode(errors="replace").strip()
    if (
        named.isascii()
        and named.isdigit()
        and any(int(named) == int(re.sub(r"\D", "", folder.name)) for folder in folders[1:])
    ):
        return [f"{TRACKER} names {named}, which is not the newest: --ckpt-step {named} continues from there"]
    return []
