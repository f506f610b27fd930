"""SentencePiece models."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from megallm.data.tokenizer import special_tokens
from megallm.data.tokenizer.base import Tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file; texts are encoded without beginning and end tokens.

    `model` is the file's content, where it is not to be read from the path.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, model: bytes | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        if model is None and not path.is_file():
            raise ValueError(f"There is no tokenizer file {path}: SentencePiece needs its .model file.")
        self.model = path.read_bytes() if model is None else model
        self._library = SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(self.model)
        except (RuntimeError, OSError):
            raise ValueError(f"{path} is no SentencePiece model.") from None
        self.source = str(path)
        self.library = f"sentencepiece {version('sentencepiece')}"
        self.vocab_size = self._library.get_piece_size()
        if self.vocab_size == 0:
            raise ValueError(f"{path} is no SentencePiece model: it holds no pieces.")
        pieces = {self._library.id_to_piece(number): number for number in range(self.vocab_size)}
        self._find_special_tokens(pieces)

    def _find_special_tokens(self, pieces: dict[str, int]) -> None:
        self.bos_id = _known_id(self._library.bos_id())
        self.pad_id = _known_id(self._library.pad_id())
        self.cls_id = special_tokens.find_token(pieces, special_tokens.CLASSIFICATION_TOKENS)
        self.sep_id = special_tokens.find_token(pieces, special_tokens.SEPARATOR_TOKENS)
        self.mask_id = special_tokens.find_token(pieces, special_tokens.MASK_TOKENS)
        self.sentinel_ids = special_tokens.sentinel_tokens(pieces)
        eos_id = _known_id(self._library.eos_id())
        self.eod_id = special_tokens.find_end_token(pieces, None, self.source) if eos_id is None else eos_id

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._library.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode([int(number) for number in ids])

    def token_text(self, token_id: int) -> str:
        return self._library.id_to_piece(token_id)

    def definition(self) -> bytes:
        return self.model

    def texts_with_own_token(self) -> list[str]:
        library = self._library
        # Control tokens, bytes and the unknown are none; of the others, those that were not learned have no score.
        none = (library.is_control, library.is_byte, library.is_unknown, library.is_unused)
        return [
            library.id_to_piece(number).replace("\u2581", " ")
            for number in range(library.get_piece_size())
            if library.get_score(number) == 0.0 and not any(test(number) for test in none)
        ]


class ExtendedSentencePieceTokenizer(SentencePieceTokenizer):
    """A SentencePiece model with the tokens that Megatron's SentencePieceTokenizer used to append.

    These are <CLS>, <SEP>, <EOD>, <MASK>, the padding, beginning and end tokens (<PAD>, <BOS>, <EOS> where the model
    has none), and `vocab_extra_ids` sentinels; those that the model has keep their ids, the others come after its
    pieces. <EOD> ends documents. Where a text holds one of them as text it becomes that token, as in Megatron.
    """

    kind = "sentencepiece with appended tokens"

    def __init__(self, path: Path, vocab_extra_ids: int) -> None:
        self._vocab_extra_ids = vocab_extra_ids
        super().__init__(path)

    def _find_special_tokens(self, pieces: dict[str, int]) -> None:
        def piece(token_id: int, otherwise: str) -> str:
            return self._library.id_to_piece(token_id) if token_id >= 0 else otherwise

        padding = piece(self._library.pad_id(), "<PAD>")
        beginning = piece(self._library.bos_id(), "<BOS>")
        end = piece(self._library.eos_id(), "<EOS>")
        sentinels = [f"<extra_id_{number}>" for number in range(self._vocab_extra_ids)]
        names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", padding, beginning, end, *sentinels]
        next_id = self.vocab_size
        self._special: dict[str, int] = {}
        for name in names:
            if name not in self._special:
                self._special[name] = pieces.get(name, next_id)
                next_id += name not in pieces
        self.vocab_size = next_id
        self._texts = {token_id: name for name, token_id in self._special.items()}
        # The first of them in a text is taken first; none of the names starts with another one.
        self._pattern = re.compile("|".join(map(re.escape, self._special)))
        self.cls_id, self.sep_id, self.mask_id = (self._special[name] for name in ("<CLS>", "<SEP>", "<MASK>"))
        self.eod_id, self.pad_id, self.bos_id = (self._special[name] for name in ("<EOD>", padding, beginning))
        self.sentinel_ids = [self._special[name] for name in sentinels]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for found in self._pattern.finditer(text):
            ids += self._library.encode(text[start : found.start()])
            ids.append(self._special[found.group()])
            start = found.end()
        return ids + self._library.encode(text[start:])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._library.encode(list(texts), num_threads=1)
        for number, text in enumerate(texts):
            if self._pattern.search(text):
                batch[number] = self.encode(text)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        pieces: list[int] = []
        for token_id in map(int, ids):
            if token_id in self._texts:
                parts += [self._library.decode(pieces), self._texts[token_id]]
                pieces = []
            else:
                pieces.append(token_id)
        return " ".join(part for part in [*parts, self._library.decode(pieces)] if part)

    def token_text(self, token_id: int) -> str:
        return self._texts.get(token_id) or super().token_text(token_id)

    def definition(self) -> bytes:
        return self.model + f"\n{self._vocab_extra_ids} sentinels".encode()


def _known_id(number: int) -> int | None:
    """SentencePiece says -1 for a token that it does not have."""
    return number if number >= 0 else None
