"""A run that begins with a Hugging Face model, and one that leaves some behind: --load-hf, --save-hf."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path

import torch

from megallm.agreement import on_every_rank
from megallm.checkpoint.boxes import WEIGHTS, local_boxes
from megallm.config.tree import Config, ModelConfig, TrainingConfig
from megallm.convert.family import OF_TRAINING
from megallm.convert.huggingface import choose_family, open_folder, read_settings, write_folder
from megallm.convert.native import open_native
from megallm.convert.output import where_now
from megallm.convert.tokenizer_files import tokenizer_settings
from megallm.mesh import Hosts
from megallm.train.changes import check_architecture
from megallm.train.engine import Engine
from megallm.train.stopping import NOTHING, Ask, Wish

_SECONDS_BETWEEN_QUESTIONS = 1.0


def with_hugging_face_model(config: Config) -> Config:
    """`config` with the model that the folder of --load-hf describes, and its tokenizer where no flag names one.

    Raises:
        ValueError: the folder describes none that megallm has, or a flag of the model says something else.
    """
    folder = config.checkpoint.load_hf
    assert folder is not None, "there is a folder"
    there = where_now(Path(folder))
    theirs, given, default = read_settings(there), config.model, ModelConfig()
    check_architecture(f"--load-hf {folder}", theirs, given)
    kept = {name: getattr(given, name) for name in OF_TRAINING}
    clashes = [
        f"{name} is {getattr(theirs, name)!r} there and {getattr(given, name)!r} here"
        for name in (entry.name for entry in fields(ModelConfig))
        if name not in kept and getattr(given, name) not in (getattr(default, name), getattr(theirs, name))
    ]
    if clashes:
        raise ValueError(
            f"--load-hf {folder} holds another model than the flags ask for: {'; '.join(clashes)}; leave the model's "
            "flags out"
        )
    data = config.data
    if data.tokenizer_type is None:
        data = replace(data, **tokenizer_settings(there))
    return replace(config, model=replace(theirs, **kept), data=data)


def begin_with(engine: Engine, folder: str) -> list[str]:
    """Fills the engine's weights from a Hugging Face folder, in its layout: each rank reads what it holds.

    What the folder does not hold keeps its initial values. Returns sentences that the user should read.

    Raises ValueError, on all ranks alike, for what is wrong with the folder.
    """
    boxes = [box for box in local_boxes(engine.optimizer, engine.chunks, engine.mesh) if box.kind == WEIGHTS]

    def read() -> list[str]:
        with open_folder(Path(folder)) as weights:
            for box in boxes:
                if box.name not in weights.fresh:
                    weights.tensors.fill(box.name, box.offset, box.tensor)
            return list(weights.notes)

    notes = on_every_rank(engine.mesh, read)
    engine.optimizer.publish_weights()
    engine.reducer.finish_gather()
    return notes


class _Interrupted(Exception):
    """An export is to end where it is."""


def export(engine: Engine, hosts: Hosts, checkpoint: Path, ask: Ask) -> tuple[Path, Wish]:
    """Writes a checkpoint that was just saved as a Hugging Face folder under --save-hf, in the run's precision.

    The first rank does so while the others wait for it, through `hosts`. All `ask` about once a second; where the run
    is to leave, nothing is left of the folder. Returns the folder, and the wish that has ended its writing or none.

    Raises ValueError, on all ranks alike, if it cannot be written.
    """
    assert engine.config.checkpoint.save_hf is not None, "there is a folder"
    target = Path(engine.config.checkpoint.save_hf) / checkpoint.name
    wish, asked = NOTHING, time.monotonic()

    def is_under_way(here: bool) -> bool:
        under_way = torch.tensor([float(here)])
        hosts.world.all_reduce(under_way, "max")
        return bool(under_way.item())

    def go_on() -> None:
        nonlocal wish, asked
        if time.monotonic() - asked > _SECONDS_BETWEEN_QUESTIONS:
            is_under_way(True)
            wish, asked = ask(), time.monotonic()
            if wish.leaves:
                raise _Interrupted

    def write() -> None:
        try:
            with open_native(checkpoint) as weights:
                write_folder(target, weights, _dtype(engine.config.training), overwrite=True, between=go_on)
        except _Interrupted:
            return
        finally:
            # After its last question nobody waits for another.
            if not wish.leaves:
                is_under_way(False)

    def wait() -> None:
        nonlocal wish
        while not wish.leaves and is_under_way(False):
            wish = ask()

    on_every_rank(hosts, write if hosts.world.rank == 0 else wait)
    return target, wish


def check_export(config: Config) -> None:
    """Raises ValueError, before the first step, if no architecture of Hugging Face's holds the model."""
    choose_family(config, None)


def _dtype(training: TrainingConfig) -> torch.dtype | None:
    if training.bf16:
        return torch.bfloat16
    return torch.float16 if training.fp16 else None
