"""Text to token ids and back, behind one small interface. The libraries are imported when a tokenizer is built."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

# Names that end a document or a text, the most specific first.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|im_end|>", "[SEP]")
BEGIN_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "<BOS>", "[BOS]", "[CLS]")
PADDING_TOKENS = ("<|pad|>", "<pad>", "<PAD>", "[PAD]", "<|padding|>")


class Tokenizer(ABC):
    """What the rest of the program needs to know of a tokenizer.

    Attributes: `vocab_size`, every id is below it; `eod_id`, the token that ends a document; `bos_id` and `pad_id`, or
    None where there is no such token.
    """

    vocab_size: int
    eod_id: int
    bos_id: int | None
    pad_id: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer itself puts around every text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; the same as `encode` gives, faster where the library knows batches."""
        return [self.encode(text) for text in texts]


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or the folder that holds one, read by the `tokenizers` library.

    The special tokens are those that `tokenizer_config.json` beside it names, otherwise those with a well-known name.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"There is no tokenizer file {file}: HuggingFaceTokenizer needs a tokenizer.json.")
        try:
            self._library = Library.from_file(str(file))
        except Exception as error:  # the library raises no other class for a broken file
            raise ValueError(f"{file} is no tokenizer.json: {error}.") from None
        # Some files carry the limits of the model that they were made for; training text must not be cut to them.
        self._library.no_truncation()
        self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        named = _named_tokens(file.with_name("tokenizer_config.json"))
        self.eod_id = _end_token(vocabulary, named.get("eos_token"), str(file))
        self.bos_id = _find(vocabulary, (named.get("bos_token"), *BEGIN_TOKENS))
        self.pad_id = _find(vocabulary, (named.get("pad_token"), *PADDING_TOKENS))

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file; texts are encoded without beginning and end tokens."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        if not path.is_file():
            raise ValueError(f"There is no tokenizer file {path}: SentencePiece needs its .model file.")
        self._library = SentencePieceProcessor()
        try:
            self._library.Load(str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path} is no SentencePiece model.") from None
        self.vocab_size = self._library.get_piece_size()
        self.bos_id = _known_id(self._library.bos_id())
        self.pad_id = _known_id(self._library.pad_id())
        eos_id = _known_id(self._library.eos_id())
        if eos_id is None:
            pieces = {self._library.id_to_piece(number): number for number in range(self.vocab_size)}
            eos_id = _end_token(pieces, None, str(path))
        self.eod_id = eos_id

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode([int(number) for number in ids])


class NullTokenizer(Tokenizer):
    """Numbers below `vocab_size`, written as text and separated by blanks; one id more ends a document, as in Megatron.

    So the attribute `vocab_size` is one more than the argument.
    """

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"The vocabulary of NullTokenizer has {vocab_size} entries, but must have 1 at least.")
        self.eod_id = vocab_size
        self.vocab_size = vocab_size + 1
        self.bos_id = None
        self.pad_id = None

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ValueError(f"NullTokenizer reads numbers separated by blanks: {error}.") from None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"NullTokenizer has ids 0 to {self.vocab_size - 1}, not {wrong}.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(number)) for number in ids)


# Megatron's names.
FILE_TOKENIZERS: dict[str, type[HuggingFaceTokenizer] | type[SentencePieceTokenizer]] = {
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "GPTSentencePieceTokenizer": SentencePieceTokenizer,
    "Llama2Tokenizer": SentencePieceTokenizer,
}
TOKENIZER_TYPES = (*FILE_TOKENIZERS, "NullTokenizer")


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of the given type.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`.
        tokenizer_model: path of its file; for HuggingFaceTokenizer of its folder, too. NullTokenizer has none.
        vocab_size: of NullTokenizer; the others know their own.

    Raises:
        ValueError: the type is not known, its file is missing or broken, or has no token that ends a document.
    """
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise ValueError("NullTokenizer needs --vocab-size, the number of its tokens.")
        return NullTokenizer(vocab_size)
    if tokenizer_type not in FILE_TOKENIZERS:
        close = get_close_matches(tokenizer_type, TOKENIZER_TYPES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"There is no tokenizer type {tokenizer_type!r}; known are {', '.join(TOKENIZER_TYPES)}.{hint}"
        )
    if tokenizer_model is None:
        raise ValueError(f"{tokenizer_type} needs --tokenizer-model, the path of its file.")
    return FILE_TOKENIZERS[tokenizer_type](Path(tokenizer_model))


def _known_id(number: int) -> int | None:
    """SentencePiece says -1 for a token that it does not have."""
    return number if number >= 0 else None


def _find(vocabulary: dict[str, int], names: Sequence[str | None]) -> int | None:
    return next((vocabulary[name] for name in names if name is not None and name in vocabulary), None)


def _end_token(vocabulary: dict[str, int], named: str | None, file: str) -> int:
    found = _find(vocabulary, (named, *END_TOKENS))
    if found is None:
        raise ValueError(f"{file} has no token that ends a document; looked for {', '.join(END_TOKENS)}.")
    return found


def _named_tokens(file: Path) -> dict[str, str]:
    """Names of the special tokens in a `tokenizer_config.json`, where there is one."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from None
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        value = content.get(key) if isinstance(content, dict) else None
        # A token is written as its text, or as an object that describes it.
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[key] = text
    return names
