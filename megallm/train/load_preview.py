"""What a run would take up, without taking it up: which checkpoint, how much of it, what has changed since."""

from __future__ import annotations

from pathlib import Path

from megallm.checkpoint.boxes import WEIGHTS
from megallm.checkpoint.load import check_files, newest_sound
from megallm.checkpoint.manifest import Manifest, read_manifest
from megallm.config import data_parallel_size
from megallm.config.tree import Config
from megallm.convert.huggingface import open_folder
from megallm.train.changes import changes, check_architecture, check_same_model
from megallm.train.datasets import build_tokenizer_of, with_vocabulary
from megallm.train.resume import TakenUp, check_kinds, check_state, origin_of, saved_config

_MOMENTS = {"adam": {"first_moment", "second_moment"}, "sgd": {"momentum"}}


def load_preview(config: Config, world_size: int) -> list[str]:
    """Sentences about what `take_up` would do for a validated configuration, in this process alone.

    Manifest, sizes and headers of the files are compared; tensors are not read, nor is the order of the data built.

    Raises ValueError, with the sentence of the run, where it would be refused.
    """
    settings = config.checkpoint
    taken_up, folders = origin_of(settings)
    root = settings.pretrained_checkpoint or settings.load
    if not folders and settings.load_hf:
        with open_folder(Path(settings.load_hf)):
            return [f"Loading: {TakenUp.WEIGHTS.value} {settings.load_hf}"]
    if not folders:
        missing = settings.finetune or settings.exit_on_missing_checkpoint or settings.pretrained_checkpoint
        if missing:
            raise ValueError(f"{root} holds no checkpoint, and the flags allow no start without one")
        return [f"Loading: {root} holds no checkpoint, the run would start afresh"]
    config = with_vocabulary(config, build_tokenizer_of(config), world_size)
    folder, manifest, notes = newest_sound(folders, settings.allow_fallback, _read_all_but_tensors)
    kinds = {WEIGHTS} | (_MOMENTS[config.optimizer.optimizer] if taken_up is TakenUp.ALL else set())
    check_kinds(folder, manifest, kinds)
    check_state(folder, manifest, taken_up)
    saved = saved_config(folder, manifest)
    check_architecture(folder, saved.model, config.model)
    if not settings.allow_model_change:
        check_same_model(folder, saved, config)
    differences = changes(saved, manifest.state.get("saved"), config, world_size)
    return [
        f"Loading: {taken_up.value} {folder}, iteration {manifest.iteration}",
        *notes,
        _amount(config, manifest, kinds, world_size),
        *(f"changed since it was saved: {change}" for change in differences),
    ]


def _read_all_but_tensors(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    check_files(folder, manifest.files)
    return manifest


def _amount(config: Config, manifest: Manifest, kinds: set[str], world_size: int) -> str:
    read = sum(
        box.num_bytes
        for name, tensor in manifest.tensors.items()
        if name.partition("/")[0] in kinds
        for box in tensor.boxes
    )
    whole = sum(file.num_bytes for file in manifest.files)
    parallel = config.parallel
    replicas = data_parallel_size(parallel, world_size)
    shares = world_size if parallel.use_distributed_optimizer else world_size // replicas
    return (
        f"{read:,} of its {whole:,} bytes in {len(manifest.files)} files would be read"
        + (f", about {read // shares:,} by each of {world_size} processes" if world_size > 1 else "")
        + ", each byte compared with its checksum"
    )
