"""What goes with the weights in a folder of Hugging Face's: files of the tokenizer, settings of generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megallm.config.tree import DataConfig
from megallm.data.tokenizer.base import Tokenizer, TokenizerSettings
from megallm.data.tokenizer.build import build_tokenizer, settings_of
from megallm.data.tokenizer.special_tokens import read_config
from megallm.plan.vocabulary import size_in_folder

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
# Any of these makes a tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
_COMPANIONS = (
    *_VOCABULARIES,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "spiece.model",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The class of transformers that reads the files of each kind of tokenizer.
_CLASSES = {
    "HuggingFaceTokenizer": "PreTrainedTokenizerFast",
    "SentencePieceTokenizer": "LlamaTokenizer",
    "GPTSentencePieceTokenizer": "LlamaTokenizer",
    "Llama2Tokenizer": "LlamaTokenizer",
    "GPT2BPETokenizer": "GPT2Tokenizer",
    "BertWordPieceLowerCase": "BertTokenizer",
    "BertWordPieceCase": "BertTokenizer",
}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).exists() for name in _VOCABULARIES)


def tokenizer_settings(folder: Path, place: Path | None = None) -> dict[str, Any]:
    """Our settings of the tokenizer in a folder, which will be at `place`; none where there is none."""
    if not has_tokenizer(folder):
        return {}
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str((place or folder).absolute())}


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raises ValueError where the tokenizer in a folder has more tokens than a model's vocabulary."""
    try:
        size = size_in_folder(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error!r}") from None
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {size} tokens, but the model's vocabulary has {vocab_size}: its last "
            f"{size - vocab_size} would have no embedding; is it the tokenizer of another model?"
        )


def keep_companions(folder: Path, kept: Path) -> None:
    """Copies what goes with a model, and its `config.json`, to another folder."""
    for name in (*_COMPANIONS, TOKENIZER_CONFIG, GENERATION_CONFIG, "config.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, kept / name)


def write_companions(folder: Path, data: DataConfig, origin: Path | None) -> dict[str, Any]:
    """Writes the files of the tokenizer and the settings of generation; returns special tokens for `config.json`.

    They are those of `origin`, byte for byte where both versions of transformers read them, or made for the tokenizer
    of `data`.
    """
    # Where nothing is said, the library takes the ids of the family's first model.
    tokens: dict[str, Any] = dict.fromkeys(_TOKEN_IDS)
    if origin is not None:
        for name in _COMPANIONS:
            if (origin / name).exists():
                shutil.copyfile(origin / name, folder / name)
        if (origin / TOKENIZER_CONFIG).exists():
            content = (origin / TOKENIZER_CONFIG).read_bytes()
            (folder / TOKENIZER_CONFIG).write_bytes(_for_both_versions(content))
        theirs = read_config(origin / "config.json")
        tokens |= {name: theirs[name] for name in _TOKEN_IDS if name in theirs}
    elif data.tokenizer_type in _CLASSES:
        tokens |= _write_own(folder, data)
    generation = (origin / GENERATION_CONFIG) if origin is not None else None
    if generation is not None and generation.exists():
        shutil.copyfile(generation, folder / GENERATION_CONFIG)
    else:
        # Without this mark version 4 would not let the settings be changed and saved again.
        write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **tokens})
    return tokens


def _for_both_versions(content: bytes) -> bytes:
    """A `tokenizer_config.json` that version 4 reads, too: version 5 names a class and lists tokens in its own way."""
    config = json.loads(content)
    changed = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        changed.setdefault("additional_special_tokens", changed.pop("extra_special_tokens"))
    return content if changed == config else json.dumps(changed, indent=2, ensure_ascii=False).encode()


def build_tokenizer_of(data: DataConfig, origin: Path | None) -> Tokenizer:
    """The tokenizer in `origin`, or the one that `data` names. Raises ValueError where there is none."""
    if origin is not None and has_tokenizer(origin):
        return build_tokenizer(TokenizerSettings("HuggingFaceTokenizer", str(origin)))
    if data.tokenizer_type not in _CLASSES:
        raise ValueError("the model names no tokenizer of text")
    return build_tokenizer(settings_of(data))


def _write_own(folder: Path, data: DataConfig) -> dict[str, Any]:
    """The files of a tokenizer that a run of ours was given."""
    kind, path = data.tokenizer_type or "", Path(data.tokenizer_model or data.vocab_file or "")
    tokenizer = build_tokenizer_of(data, None)
    if data.vocab_file and data.merge_file:
        shutil.copyfile(data.vocab_file, folder / "vocab.json")
        shutil.copyfile(data.merge_file, folder / "merges.txt")
    elif path.is_dir():
        for name in _COMPANIONS:
            if (path / name).exists():
                shutil.copyfile(path / name, folder / name)
    else:
        name = (
            "tokenizer.json" if path.suffix == ".json" else "vocab.txt" if path.suffix == ".txt" else "tokenizer.model"
        )
        shutil.copyfile(path, folder / name)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id, "pad_token": tokenizer.pad_id}
    ids |= {"cls_token": tokenizer.cls_id, "sep_token": tokenizer.sep_id, "mask_token": tokenizer.mask_id}
    named = {role: tokenizer.token_text(number) for role, number in ids.items() if number is not None}
    config: dict[str, Any] = {"tokenizer_class": _CLASSES[kind], **named}
    if kind.startswith("BertWordPiece"):
        config["do_lower_case"] = kind == "BertWordPieceLowerCase"
    write_json(folder / TOKENIZER_CONFIG, config)
    return {f"{role}_id": ids[role] for role in ("bos_token", "eos_token", "pad_token") if ids[role] is not None}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
