"""SentencePiece models."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from megallm.data.tokenizer import special_tokens
from megallm.data.tokenizer.base import Tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file; texts are encoded without beginning and end tokens."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        if not path.is_file():
            raise ValueError(f"There is no tokenizer file {path}: SentencePiece needs its .model file.")
        self._content = path.read_bytes()
        self._library = SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(self._content)
        except (RuntimeError, OSError):
            raise ValueError(f"{path} is no SentencePiece model.") from None
        self.source = str(path)
        self.library = f"sentencepiece {version('sentencepiece')}"
        self.vocab_size = self._library.get_piece_size()
        self.bos_id = _known_id(self._library.bos_id())
        self.pad_id = _known_id(self._library.pad_id())
        pieces = {self._library.id_to_piece(number): number for number in range(self.vocab_size)}
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
        return self._content


def _known_id(number: int) -> int | None:
    """SentencePiece says -1 for a token that it does not have."""
    return number if number >= 0 else None
