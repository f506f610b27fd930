"""Documents to the tokens, lengths and counts that are written: the same in every process that does it."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from megallm.data.indexed.format import token_dtype
from megallm.data.text.documents import texts_of
from megallm.data.text.raw import BadDocument, RawDocument
from megallm.data.tokenizer.base import Tokenizer, TokenizerSettings
from megallm.data.tokenizer.build import build_tokenizer
from megallm.data.tokenizer.fast import FastTokenizerDiffers

# Bad documents that are told with their place; the others are counted.
TOLD_BAD_DOCUMENTS = 10
# Kinds of documents that hold nothing, and that nobody misses.
PASSED_OVER = ("blank", "empty")


@dataclass(frozen=True)
class EncodeSettings:
    """What the tokens of a document depend on, apart from the document.

    Attributes: `tokenizer`; `keys` of the JSON objects whose texts are tokenized; `append_eod`, whether the token that
    ends documents is added; `sentence_language` in which texts are cut into sentences, a sequence each, or None;
    `keep_newlines`, whether a sentence keeps the line breaks after it; `skip_bad_documents`, or stop at the first.
    """

    tokenizer: TokenizerSettings
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    sentence_language: str | None = None
    keep_newlines: bool = False
    skip_bad_documents: bool = False


@dataclass(frozen=True)
class KeyTokens:
    """What documents have under one key, in the form in which it is written.

    Attributes: `tokens` in the dtype of the dataset; `lengths`, int32, of the sequences; `sequences`, int32, of each
    document.
    """

    tokens: bytes | memoryview
    lengths: bytes | memoryview
    sequences: bytes | memoryview


@dataclass
class Encoded:
    """What became of a batch.

    Attributes: `keys`, in the order of the settings; `documents` and `input_bytes` read, without the bad ones;
    `bad`, (kind, sentence) of the bad documents; `stopped`, whether the last of them ended the work; `blank`, blank
    lines and empty files, which are passed over.
    """

    keys: list[KeyTokens] = field(default_factory=list)
    documents: int = 0
    input_bytes: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    stopped: bool = False
    blank: int = 0


class _Parsed(NamedTuple):
    """A document and its texts, for each key."""

    document: RawDocument
    texts: list[list[str]]


class Encoder:
    """Makes the tokens of documents.

    Attributes: `tokenizer`; `dtype` of the tokens.

    Raises:
        ValueError: the tokenizer or the splitter of sentences cannot be built.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        # One thread for each process: threads of the library would fight with the other workers for the same cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._settings = settings
        self._split: Callable[[str], list[str]] | None = None
        if settings.sentence_language is not None:
            from megallm.data.text.sentences import check_language, split_sentences

            check_language(settings.sentence_language)
            self._split = partial(
                split_sentences, language=settings.sentence_language, keep_newlines=settings.keep_newlines
            )
        self.tokenizer: Tokenizer = build_tokenizer(settings.tokenizer)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        # A sentence is a part of a sample, which gets its own beginning and end.
        around = ([], []) if self._split is None else self.tokenizer.surroundings()
        self._around = len(around[0]), len(around[1])

    def encode(self, documents: Iterable[RawDocument]) -> Encoded:
        """Tokens of a batch of documents.

        A text without tokens makes no sequence; a document without any gets no end-of-document token. Where bad
        documents are not skipped, the result ends before the first of them.

        Raises:
            ValueError: a file cannot be read, or the fast library gave other ids than the reference.
        """
        result = Encoded()
        parsed: list[_Parsed] = []
        for document in documents:
            try:
                texts = texts_of(document, self._settings.keys)
            except BadDocument as error:
                if error.kind in PASSED_OVER:
                    result.blank += 1
                    continue
                result.bad.append((error.kind, str(error)))
                if not self._settings.skip_bad_documents:
                    break
            else:
                parsed.append(_Parsed(document, texts if self._split is None else list(map(self._cut, texts))))
        try:
            parsed, result.keys = self._encode_good(parsed, result)
        except _LibraryDiffers as error:
            raise ValueError(str(error)) from None
        result.stopped = bool(result.bad) and not self._settings.skip_bad_documents
        result.documents = len(parsed)
        result.input_bytes = sum(len(item.document.content) for item in parsed)
        return result

    def _cut(self, texts: list[str]) -> list[str]:
        assert self._split is not None, "only called where sentences are asked for"
        return [sentence for text in texts for sentence in self._split(text)]

    def _encode_good(self, parsed: list[_Parsed], result: Encoded) -> tuple[list[_Parsed], list[KeyTokens]]:
        """Those documents that the tokenizer takes, and their tokens; the others become bad ones of the result."""
        try:
            return parsed, self._encode(parsed)
        except ValueError as error:
            good = self._leave_out_refused(parsed, result)
            if len(good) == len(parsed):
                raise error
            return good, self._encode(good)

    def _leave_out_refused(self, parsed: list[_Parsed], result: Encoded) -> list[_Parsed]:
        """Encode one document after another, to find those that the message must name; gives the others."""
        good = []
        for item in parsed:
            try:
                self._encode([item])
                good.append(item)
            except ValueError as error:
                refusal = ("refused_by_tokenizer", f"{item.document.place}: {error}")
                if not self._settings.skip_bad_documents:
                    # It stands before any document that could not be parsed: that ended the batch.
                    result.bad = [refusal]
                    return good
                result.bad.append(refusal)
        return good

    def _encode(self, parsed: Sequence[_Parsed]) -> list[KeyTokens]:
        try:
            return [self._encode_key([item.texts[key] for item in parsed]) for key in range(len(self._settings.keys))]
        except FastTokenizerDiffers as error:
            raise _LibraryDiffers(f"{parsed[error.index].document.place}: {error}") from None

    def _encode_key(self, texts: Sequence[list[str]]) -> KeyTokens:
        """Tokens of the documents, given the texts of each under one key."""
        texts_per_document = np.fromiter(map(len, texts), np.int64, len(texts))
        document_of_text = np.repeat(np.arange(len(texts)), texts_per_document)
        try:
            ids, lengths = self.tokenizer.encode_flat([text for parts in texts for text in parts])
        except FastTokenizerDiffers as error:
            raise FastTokenizerDiffers(int(document_of_text[error.index]), str(error)) from None
        self._check_range(ids)
        if any(self._around):
            ids, lengths = without_surroundings(ids, lengths, *self._around)
        filled = lengths > 0
        # [sequences]
        sequence_lengths = lengths[filled].astype("<i4")
        # [documents]
        sequences = np.bincount(document_of_text[filled], minlength=len(texts)).astype("<i4")
        if self._settings.append_eod:
            last_sequences = np.cumsum(sequences)[sequences > 0] - 1
            ends = np.cumsum(sequence_lengths, dtype=np.int64)[last_sequences]
            ids = np.insert(ids.astype(self.dtype, copy=False), ends, self.tokenizer.eod_id)
            sequence_lengths[last_sequences] += 1
        tokens = np.ascontiguousarray(ids, self.dtype)
        return KeyTokens(tokens.data.cast("B"), sequence_lengths.data.cast("B"), sequences.data.cast("B"))

    def _check_range(self, ids: np.ndarray) -> None:
        if ids.size == 0:
            return
        lowest, highest, limit = int(ids.min()), int(ids.max()), self.tokenizer.vocab_size
        if lowest < 0 or highest >= limit:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"The tokenizer gave id {wrong}, but says that it has ids 0 to {limit - 1}.")


def without_surroundings(
    ids: np.ndarray, lengths: np.ndarray, before: int, after: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts without their first `before` and last `after` tokens: `ids` [tokens] of texts of `lengths` [texts]."""
    ends = np.cumsum(lengths)
    is_kept = np.ones(len(ids), bool)
    for number in range(before):
        is_kept[ends - lengths + number] = False
    for number in range(after):
        is_kept[ends - 1 - number] = False
    return ids[is_kept], lengths - before - after


class _LibraryDiffers(Exception):
    """The fast library gave other ids than the reference: nothing that it made can be trusted."""
