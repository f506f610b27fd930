"""Numbers as text."""

from collections.abc import Sequence

from megallm.data.tokenizer.base import BadText, Tokenizer


class NullTokenizer(Tokenizer):
    """Numbers below `vocab_size`, written as text and separated by blanks.

    Without `eod_id` one id more ends a document, as in Megatron: the attribute `vocab_size` is one more than the
    argument. An `eod_id` is one of the numbers.
    """

    kind = "null"

    def __init__(self, vocab_size: int, eod_id: int | None = None) -> None:
        if vocab_size < 1:
            raise ValueError(f"The vocabulary of NullTokenizer has {vocab_size} entries, but must have 1 at least.")
        if vocab_size >= 2**31:
            raise ValueError(f"--vocab-size {vocab_size} is above {2**31 - 1}: ids are stored in 32 bits.")
        if eod_id is not None and not 0 <= eod_id < vocab_size:
            raise ValueError(f"--null-tokenizer-eod-id {eod_id} is none of the ids 0 to {vocab_size - 1}.")
        self.eod_id = vocab_size if eod_id is None else eod_id
        self.vocab_size = vocab_size + (eod_id is None)

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            try:
                ids.append(int(word))
            except ValueError:
                raise BadText(
                    f"NullTokenizer reads whole numbers separated by blanks, not {word[:40]!r}; text takes another "
                    "tokenizer, such as HuggingFaceTokenizer."
                ) from None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise BadText(f"NullTokenizer has ids 0 to {self.vocab_size - 1}, not {wrong}.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(number)) for number in ids)

    def token_text(self, token_id: int) -> str:
        return str(token_id)

    def definition(self) -> bytes:
        return str(self.vocab_size).encode()
