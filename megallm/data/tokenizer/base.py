"""What the rest of the program needs to know of a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

# Whether the fast library serves preprocessing: where it can, in any case, not at all.
FAST_TOKENIZER = ("auto", "always", "never")


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokenizer to build.

    Attributes:
        tokenizer_type: Megatron's name of the kind, one of `TOKENIZER_TYPES`.
        tokenizer_model: path of its file, or of the folder that holds its files.
        vocab_file, merge_file: paths of the files of GPT2BPETokenizer and of BERT's kinds, where they are given singly.
        vocab_size: of NullTokenizer, and of TikTokenizer on a list of tokens that is longer; others know their own.
        vocab_extra_ids: sentinel tokens `<extra_id_0>`, ... that are appended for T5.
        tokenizer_sentencepiece_legacy: SentencePieceTokenizer appends <CLS>, <SEP>, <EOD>, <MASK> and what else the
            model lacks, as Megatron did up to 2025; always so with `vocab_extra_ids`.
        null_tokenizer_eod_id: the id of NullTokenizer that ends a document; None adds one.
        tiktoken_pattern: how TikTokenizer cuts text into words, one of `PATTERNS` there; None for what the file says.
        tiktoken_num_special_tokens: ids that a list of tokens sets aside for special tokens, before all others.
        tiktoken_special_tokens: their texts, where they are not the usual ones.
        fast_tokenizer: "auto" takes gigatoken where it is installed and gives the same ids, "always" insists on it,
            "never" does without. It serves `encode_flat` only, that is preprocessing.
    """

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    vocab_extra_ids: int = 0
    tokenizer_sentencepiece_legacy: bool = False
    null_tokenizer_eod_id: int | None = None
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int = 1000
    tiktoken_special_tokens: tuple[str, ...] | None = None
    fast_tokenizer: str = "never"


class BadText(ValueError):
    """A text that the tokenizer does not take."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: name of the kind in the records beside datasets; two names of one kind give the same ids.
        source: path that it was read from, for messages; "" where there is none.
        library: name and version of the library that does the work.
        fast_library: the same of the fast library where it serves `encode_flat`; "" where it does not.
        fast_refusal: why the fast library does not serve, where it was wanted.
        vocab_size: every id is below it.
        eod_id: the token that ends a document.
        bos_id, pad_id, cls_id, sep_id, mask_id: other special tokens, None where there is no such token.
        sentinel_ids: sentinels for T5, `<extra_id_0>` first.
    """

    kind: str
    source: str = ""
    library: str = ""
    fast_library: str = ""
    fast_refusal: str = ""
    vocab_size: int
    eod_id: int
    bos_id: int | None = None
    pad_id: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    mask_id: int | None = None
    sentinel_ids: Sequence[int] = ()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer itself puts around every text.

        Raises BadText for a text that it does not take.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids."""

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """How one token is written in its vocabulary."""

    @abstractmethod
    def definition(self) -> bytes:
        """Everything that decides which ids a text gets, as bytes that do not depend on paths."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; the same as `encode` gives, faster where the library knows batches."""
        return [self.encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back, int32 [ids], and how many each has, int64 [texts]."""
        return flatten(self.encode_batch(texts))

    def surroundings(self) -> tuple[list[int], list[int]]:
        """Special tokens that are put before and after every text."""
        return [], []

    def texts_with_own_token(self) -> list[str]:
        """Texts that are looked for in every document and become a token of their own."""
        return []

    def special_tokens(self) -> dict[str, int]:
        """Id of each special token that there is, by its role; the end of document comes first."""
        roles = {
            "end of document": self.eod_id,
            "beginning": self.bos_id,
            "padding": self.pad_id,
            "classification": self.cls_id,
            "separator": self.sep_id,
            "mask": self.mask_id,
        }
        return {role: token_id for role, token_id in roles.items() if token_id is not None}


def flatten(batch: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids back to back, int32 [ids], and their lengths, int64 [lists]."""
    lengths = np.fromiter(map(len, batch), np.int64, len(batch))
    return np.fromiter(chain.from_iterable(batch), np.int32, int(lengths.sum())), lengths


def state_special_tokens(tokenizer: Tokenizer) -> str:
    """One line that names the special tokens: `end of document <|endoftext|> = 0, padding <pad> = 1`."""
    parts = [f"{role} {tokenizer.token_text(number)} = {number}" for role, number in tokenizer.special_tokens().items()]
    if tokenizer.sentinel_ids:
        first, last = tokenizer.sentinel_ids[0], tokenizer.sentinel_ids[-1]
        parts.append(f"{len(tokenizer.sentinel_ids)} sentinels {first} to {last}")
    return ", ".join(parts)


def state_library(tokenizer: Tokenizer) -> str:
    """Which library tokenizes, and why it is not the fast one where that was wanted."""
    if tokenizer.fast_library:
        return f"{tokenizer.fast_library}, checked against {tokenizer.library}"
    if tokenizer.fast_refusal:
        return f"{tokenizer.library or tokenizer.kind} ({tokenizer.fast_refusal.rstrip('.')})"
    return tokenizer.library or tokenizer.kind
