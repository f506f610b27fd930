"""Tokenizers that the `tokenizers` library runs: `tokenizer.json`, GPT-2's pair of files, BERT's vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megallm.data.tokenizer import special_tokens
from megallm.data.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

# Classes of transformers whose rules are those of `gpt2_library` and `wordpiece_library`. Other classes keep their
# vocabulary in files of the same names, but cut the text in another way.
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizerFast")
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    `define` gives the `definition`, from the files: what the library writes may change with its version. The special
    tokens are those that `named` says (the content of `tokenizer_config.json`), otherwise those with a well-known name.
    """

    kind = "tokenizers"

    def __init__(
        self, library: Library, source: Path, define: Callable[[], bytes], named: Mapping[str, str] | None = None
    ) -> None:
        # A process tokenizes on one thread: processes are what is many, and threads would take each other's cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        named = named or {}
        # Some files carry the limits of the model that they were made for; training text must not be cut to them.
        library.no_truncation()
        library.no_padding()
        self._library, self._define = library, define
        self.source = str(source)
        self.library = f"tokenizers {version('tokenizers')}"
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = special_tokens.find_end_token(vocabulary, named.get("eos_token"), self.source)
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
        return self._define()

    def texts_with_own_token(self) -> list[str]:
        return [token.content for token in self._library.get_added_tokens_decoder().values()]

    def surroundings(self) -> tuple[list[int], list[int]]:
        inner = self._library.encode("a", add_special_tokens=False).ids
        whole = self._library.encode("a").ids
        start = next((n for n in range(len(whole)) if whole[n : n + len(inner)] == inner), 0)
        return whole[:start], whole[start + len(inner) :]

    def serialized(self) -> str:
        """The content of its `tokenizer.json`."""
        return self._library.to_str()


def read_tokenizer_json(file: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json`, with the special tokens of a `tokenizer_config.json` beside it.

    Raises ValueError if the file is missing or broken.
    """
    from tokenizers import Tokenizer as Library

    if not file.is_file():
        raise ValueError(f"There is no tokenizer file {file}: HuggingFaceTokenizer needs a tokenizer.json.")
    try:
        library = Library.from_file(str(file))
    except Exception as error:  # the library raises no other class for a broken file
        raise ValueError(f"{file} is no tokenizer.json: {error}.") from None
    config = special_tokens.read_config(file.with_name("tokenizer_config.json"))
    return HuggingFaceTokenizer(library, file, lambda: _definition(file), special_tokens.named_tokens(config))


def _definition(file: Path) -> bytes:
    """A `tokenizer.json` without what does not change the ids: its layout, and its limits on length."""
    content = json.loads(file.read_bytes())
    content["truncation"] = content["padding"] = None
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        # Older files write a pair as one text.
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return json.dumps(content, sort_keys=True).encode()


def gpt2_library(vocab_file: Path, merge_file: Path) -> Library:
    """GPT-2's byte-level BPE from `vocab.json` and `merges.txt`. Raises ValueError if one is missing or broken."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    check_files(vocab_file, merge_file)
    try:
        library = Library(models.BPE.from_file(str(vocab_file), str(merge_file)))
    except Exception as error:  # the library raises no other class for a broken file
        raise ValueError(f"{vocab_file} and {merge_file} are no vocabulary and merges of GPT-2: {error}.") from None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    _mark_special(library, [AddedToken("<|endoftext|>", special=True, normalized=False)])
    return library


def wordpiece_library(vocab_file: Path, lower_case: bool) -> Library:
    """BERT's WordPiece from `vocab.txt`, without [CLS] and [SEP] around a text.

    Raises ValueError if the file is missing or is no vocabulary of BERT.
    """
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library

    check_files(vocab_file)
    try:
        words = vocab_file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{vocab_file} is no vocab.txt: byte {error.start} is no UTF-8.") from None
    if words[-1] == "":
        words.pop()
    vocabulary = {word.rstrip("\r"): number for number, word in enumerate(words)}
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]") if name not in vocabulary]
    if missing:
        raise ValueError(f"{vocab_file} is no vocabulary of BERT: there is no {', '.join(missing)}.")
    library = Library(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    library.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    names = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
    _mark_special(library, [AddedToken(name, special=True, normalized=False) for name in names])
    return library


def append_tokens(library: Library, names: Sequence[str]) -> None:
    """Give those of the names that the vocabulary lacks the next ids."""
    from tokenizers import AddedToken

    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def with_classification_tokens(library: Library) -> Library:
    """The same, with [CLS] and [SEP] around every text, as transformers puts them."""
    from tokenizers import processors

    ends = [(name, library.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return library


def check_class(folder: Path, config: Mapping[str, Any], known: Sequence[str], files: str) -> None:
    """Raise ValueError where a folder without `tokenizer.json` is of a class whose rules its files do not hold."""
    name = config.get("tokenizer_class")
    if (name is not None and name not in known) or (folder / "added_tokens.json").exists():
        raise ValueError(
            f"{folder} holds {files}, but no tokenizer.json, and its tokenizer class {name} cuts text by rules that "
            f"stand in no file. Write a tokenizer.json there: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )


def check_files(*files: Path) -> None:
    """Raise ValueError if one of the files is not there."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"There is no tokenizer file {file}.")


def _mark_special(library: Library, tokens: Sequence[Any]) -> None:
    """Make tokens that the vocabulary has be found in texts as wholes."""
    library.add_special_tokens([token for token in tokens if library.token_to_id(token.content) is not None])
