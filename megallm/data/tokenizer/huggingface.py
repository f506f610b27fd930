"""Tokenizers that the `tokenizers` library reads: `tokenizer.json`, GPT-2's pair of files, BERT's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megallm.data.tokenizer import special_tokens
from megallm.data.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or the folder that holds one.

    The special tokens are those that `tokenizer_config.json` beside it names, otherwise those with a well-known name.
    """

    kind = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"There is no tokenizer file {file}: HuggingFaceTokenizer needs a tokenizer.json.")
        self._set_library(_read(file), str(file), special_tokens.named_tokens(file.with_name("tokenizer_config.json")))

    def _set_library(self, library: Library, source: str, named: dict[str, str]) -> None:
        # Some files carry the limits of the model that they were made for; training text must not be cut to them.
        library.no_truncation()
        library.no_padding()
        self._library = library
        self.source = source
        self.library = f"tokenizers {version('tokenizers')}"
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = special_tokens.find_end_token(vocabulary, named.get("eos_token"), source)
        find = special_tokens.find_token
        self.bos_id = find(vocabulary, (named.get("bos_token"), *special_tokens.BEGIN_TOKENS))
        self.pad_id = find(vocabulary, (named.get("pad_token"), *special_tokens.PADDING_TOKENS))
        self.cls_id = find(vocabulary, (named.get("cls_token"), *special_tokens.CLASSIFICATION_TOKENS))
        self.sep_id = find(vocabulary, (named.get("sep_token"), *special_tokens.SEPARATOR_TOKENS))
        self.mask_id = find(vocabulary, (named.get("mask_token"), *special_tokens.MASK_TOKENS))
        self.sentinel_ids = special_tokens.sentinel_tokens(vocabulary)

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode([int(number) for number in ids], skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        return self._library.id_to_token(token_id) or ""

    def definition(self) -> bytes:
        content = json.loads(self._library.to_str())
        # The layout of the file and its limits on length do not change the ids.
        content["truncation"] = content["padding"] = None
        return json.dumps(content, sort_keys=True).encode()


def _read(file: Path) -> Library:
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_file(str(file))
    except Exception as error:  # the library raises no other class for a broken file
        raise ValueError(f"{file} is no tokenizer.json: {error}.") from None
