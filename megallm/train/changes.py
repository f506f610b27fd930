"""How a run differs from the one that saved its checkpoint: told field by field, refused where it is unsafe."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

import megallm
from megallm.config import difference
from megallm.config.report import printable
from megallm.config.resolve import PROGRAMS
from megallm.config.tree import Config, ModelConfig

# Settings of the model that leave the meaning of its weights as it is. A longer table of positions shows in the shape
# of its tensor, where it has one.
_FREE = (
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "group_query_attention",
)
# What bears on no number that a run computes.
_SILENT_SECTIONS = ("checkpoint.", "logging.", "plan.")
_SILENT = (
    "training.device",
    "training.exit_interval",
    "training.exit_duration_in_mins",
    "data.num_workers",
    "parallel.ddp_bucket_size",
)


def check_architecture(origin: object, there: ModelConfig, wanted: ModelConfig) -> None:
    """Raises ValueError where a model is of another architecture than the one to train."""
    if there.architecture != wanted.architecture:
        raise ValueError(
            f"{origin} holds a {there.architecture}, and this program trains a {wanted.architecture}: give it to "
            f"{PROGRAMS[there.architecture]}"
        )


def check_same_model(folder: object, saved: Config, wanted: Config) -> None:
    """Raises ValueError with every setting in which the saved model is another.

    Shapes alone do not tell: a model of fewer layers, or with another activation, would load without a word.
    """
    names = [field.name for field in fields(ModelConfig) if field.name not in _FREE]
    pairs = {name: (getattr(saved.model, name), getattr(wanted.model, name)) for name in names}
    changed = [f"{name} is {there!r} there and {here!r} here" for name, (there, here) in pairs.items() if there != here]
    if changed:
        raise ValueError(
            f"{folder} was saved from another model: {'; '.join(changed)}. Give the flags of the run that saved it, or "
            "--use-checkpoint-args to take them from there. --allow-model-change goes on all the same, if the tensors "
            "fit"
        )


def changes(saved: Config, made_by: Any, now: Config, world_size: int) -> list[str]:
    """Each difference that bears on the numbers, the layout or the versions, as `name: old -> new`.

    `made_by` is what the manifest has under `saved`: versions and processes of the run that saved it.
    """
    found = [
        f"{path}: {_shown(old)} -> {_shown(new)}"
        for path, old, new in difference(saved, now)
        if not path.startswith(_SILENT_SECTIONS) and path not in _SILENT
    ]
    here = {"world_size": world_size, "megallm": megallm.__version__, "torch": torch.__version__}
    there = made_by if isinstance(made_by, dict) else {}
    names = {"world_size": "processes"}
    return found + [
        f"{names.get(key, key)}: {_shown(there[key])} -> {value}"
        for key, value in here.items()
        if key in there and there[key] != value
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else "nothing" if value in ("", []) else printable(str(value))
