"""The model of a run from its checkpoint instead of from flags: --use-checkpoint-args."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from megallm.checkpoint.load import find_checkpoints
from megallm.checkpoint.manifest import read_manifest
from megallm.config import Config, difference
from megallm.config.tree import DataConfig, ModelConfig
from megallm.train.changes import check_architecture
from megallm.train.resume import saved_config

_TOKENIZER = tuple(
    field.name
    for field in fields(DataConfig)
    if field.name.startswith(("tokenizer_", "tiktoken_", "null_tokenizer_"))
    or field.name in ("vocab_file", "merge_file")
)


def with_saved_model(config: Config) -> tuple[Config, list[str]]:
    """`config` with the model of the checkpoint that --load or --pretrained-checkpoint will be taken up from.

    Sequence length and tokenizer come from there too, where the flags name none. Also returns a sentence for each flag
    of the model that had another value. Where no folder is named nothing is taken, and the validation says so.

    Raises ValueError where there is no checkpoint, or its configuration cannot be read.
    """
    if not (config.checkpoint.load or config.checkpoint.pretrained_checkpoint):
        return config, []
    folder = _folder(config)
    saved = saved_config(folder, read_manifest(folder))
    check_architecture(folder, saved.model, config.model)
    data = config.data
    if not data.seq_length:
        data = replace(data, seq_length=saved.data.seq_length)
    if data.tokenizer_type is None:
        data = replace(data, **{name: getattr(saved.data, name) for name in _TOKENIZER})
    taken = replace(config, model=saved.model, data=data)
    defaults = ModelConfig()
    notes = [
        f"{path} is {new} as in {folder}, not {old} as the flags say"
        for path, old, new in difference(config, taken)
        if path.startswith("model.") and old != getattr(defaults, path.removeprefix("model."))
    ]
    return taken, notes


def _folder(config: Config) -> Path:
    settings = config.checkpoint
    found = find_checkpoints(settings.load, settings.ckpt_step) if settings.load else []
    if not found and settings.pretrained_checkpoint:
        found = find_checkpoints(settings.pretrained_checkpoint)
    if not found:
        raise ValueError(
            f"--use-checkpoint-args: {settings.load or settings.pretrained_checkpoint} holds no checkpoint"
        )
    return found[0]
