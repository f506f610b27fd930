"""Finding the special tokens of a vocabulary by their names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Names that end a document or a text, the most specific first.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|im_end|>", "[SEP]")
BEGIN_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "<BOS>", "[BOS]", "[CLS]")
PADDING_TOKENS = ("<|pad|>", "<pad>", "<PAD>", "[PAD]", "<|padding|>")
CLASSIFICATION_TOKENS = ("[CLS]", "<CLS>", "<cls>")
SEPARATOR_TOKENS = ("[SEP]", "<SEP>", "<sep>")
MASK_TOKENS = ("[MASK]", "<MASK>", "<mask>", "<|mask|>")


def find_token(vocabulary: Mapping[str, int], names: Sequence[str | None]) -> int | None:
    """Id of the first of `names` that the vocabulary holds."""
    return next((vocabulary[name] for name in names if name is not None and name in vocabulary), None)


def find_end_token(vocabulary: Mapping[str, int], named: str | None, source: str) -> int:
    """Id of the token that ends a document: the one that the tokenizer names, or one with a well-known name.

    Raises ValueError where there is none.
    """
    found = find_token(vocabulary, (named, *END_TOKENS))
    if found is None:
        raise ValueError(f"{source} has no token that ends a document; looked for {', '.join(END_TOKENS)}.")
    return found


def sentinel_tokens(vocabulary: Mapping[str, int]) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, ..., as many as there are without a gap."""
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[name])
    return found


def read_config(file: Path) -> dict[str, Any]:
    """A `tokenizer_config.json`, {} where there is none. Raises ValueError if it is no JSON object."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return content


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens that a `tokenizer_config.json` names, by their roles there (`eos_token`, ...)."""
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token"):
        value = config.get(key)
        # A token is written as its text, or as an object that describes it.
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[key] = text
    return names
