"""The model of a run from a folder instead of from flags: --use-checkpoint-args, --load-hf."""

from __future__ import annotations

from dataclasses import fields, replace

from megallm.checkpoint.load import newest_sound
from megallm.checkpoint.manifest import read_manifest
from megallm.config import Config, difference
from megallm.config.tree import DataConfig, ModelConfig
from megallm.train.changes import check_architecture
from megallm.train.resume import origin_of, saved_config

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
    _, folders = origin_of(config.checkpoint)
    if not folders:
        named = config.checkpoint.load or config.checkpoint.pretrained_checkpoint
        raise ValueError(f"--use-checkpoint-args: {named} holds no checkpoint")
    folder, manifest, told = newest_sound(folders, config.checkpoint.allow_fallback, read_manifest)
    saved = saved_config(folder, manifest)
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
    return taken, told + notes


def with_model_of_files(config: Config) -> tuple[Config, list[str]]:
    """`config` with the model that --use-checkpoint-args or --load-hf takes from a folder, and sentences about it.

    Reads files: in a job of several processes one does so and tells the others.
    """
    notes: list[str] = []
    if config.checkpoint.use_checkpoint_args:
        config, notes = with_saved_model(config)
    if config.checkpoint.load_hf:
        # Imported here: no other run needs the converter.
        from megallm.train.hugging_face import with_hugging_face_model

        config = with_hugging_face_model(config)
    return config, notes
