"""Training of tokenizers on texts: byte-level BPE and unigram, BERT's WordPiece, and SentencePiece's two kinds."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megallm.data.tokenizer.base import Tokenizer
from megallm.data.tokenizer.huggingface import HuggingFaceTokenizer, with_classification_tokens
from megallm.data.tokenizer.sentencepiece import SentencePieceTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

TRAINED_KINDS = ("bpe", "unigram", "wordpiece", "sentencepiece-bpe", "sentencepiece-unigram")
END_OF_DOCUMENT = "<|endoftext|>"
WORDPIECE_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# SentencePiece passes over sentences that are longer, so longer lines are cut.
LONGEST_SENTENCE = 8192


@dataclass(frozen=True)
class TrainingSettings:
    """What to train.

    Attributes:
        kind: one of `TRAINED_KINDS`.
        vocab_size: tokens to make, all special ones among them; fewer come out of a text that has no more.
        special_tokens: texts that are tokens of their own, besides those that the kind has.
        lower_case: WordPiece lowers letters and drops accents.
        byte_fallback: SentencePiece writes a character that it has not met as bytes; without, as the unknown token.
        character_coverage: share of the characters in the text that SentencePiece makes pieces of.
    """

    kind: str
    vocab_size: int
    special_tokens: tuple[str, ...] = ()
    lower_case: bool = False
    byte_fallback: bool = True
    character_coverage: float = 0.9995


@dataclass(frozen=True)
class Trained:
    """A trained tokenizer. Attributes: `tokenizer`, ready to use; `content` of its file."""

    tokenizer: Tokenizer
    content: bytes


def train_tokenizer(settings: TrainingSettings, texts: Iterable[str], output: Path) -> Trained:
    """Train on the texts, of which one is held at a time by BPE, unigram and WordPiece; SentencePiece holds them all.

    `output` is where the caller will write the content: its name is used in messages, and ending in `.txt` it makes
    WordPiece give BERT's vocabulary instead of a tokenizer.json.

    Raises:
        ValueError: the kind is not known, the vocabulary is too small for it, or the texts do not suffice.
    """
    kind = settings.kind
    if kind not in TRAINED_KINDS:
        raise ValueError(f"There is no kind of tokenizer {kind!r} to train; known are {', '.join(TRAINED_KINDS)}.")
    if len(set(settings.special_tokens)) < len(settings.special_tokens) or "" in settings.special_tokens:
        raise ValueError("The special tokens must be texts that differ from each other.")
    if kind.startswith("sentencepiece-"):
        return _train_sentencepiece(settings, texts, output)
    if kind == "wordpiece":
        return _train_wordpiece(settings, texts, output)
    library = _train_byte_level(settings, texts)
    content = library.to_str(pretty=True).encode()
    return Trained(HuggingFaceTokenizer(library, output, lambda: content), content)


def smallest_vocabulary(settings: TrainingSettings) -> tuple[int, str]:
    """The fewest tokens of a kind, and of what they are; (1, "") where only the text tells."""
    others = _without(settings.special_tokens, (END_OF_DOCUMENT,))
    named = ", ".join((END_OF_DOCUMENT, *others))
    if settings.kind in ("bpe", "unigram"):
        return 257 + len(others), f"256 bytes and {named}"
    if settings.kind.startswith("sentencepiece-") and settings.byte_fallback:
        return 259 + len(settings.special_tokens), "256 bytes, <unk>, <s>, </s> and the special tokens"
    return 1, ""


def _train_byte_level(settings: TrainingSettings, texts: Iterable[str]) -> Library:
    """BPE or unigram over bytes: every text can be encoded and comes back unchanged."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    smallest, parts = smallest_vocabulary(settings)
    if settings.vocab_size < smallest:
        raise ValueError(f"--vocab-size {settings.vocab_size} is too small: {parts} need {smallest}.")
    bpe = settings.kind == "bpe"
    library = Library(models.BPE() if bpe else models.Unigram())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = (trainers.BpeTrainer if bpe else trainers.UnigramTrainer)(
        vocab_size=settings.vocab_size,
        special_tokens=[END_OF_DOCUMENT, *_without(settings.special_tokens, (END_OF_DOCUMENT,))],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(iter(texts), trainer)
    return library


def _train_wordpiece(settings: TrainingSettings, texts: Iterable[str], output: Path) -> Trained:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special_tokens = [*WORDPIECE_TOKENS, *_without(settings.special_tokens, WORDPIECE_TOKENS)]
    if settings.vocab_size <= len(special_tokens):
        raise ValueError(
            f"--vocab-size {settings.vocab_size} is too small: {', '.join(special_tokens)} need {len(special_tokens)}, "
            f"and there must be words."
        )
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=settings.lower_case)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.vocab_size, special_tokens=special_tokens, show_progress=False
    )
    library.train_from_iterator(iter(texts), trainer)
    # Used without [CLS] and [SEP] around a text, written with them, as models of this kind expect it.
    content = library.to_str()
    tokenizer = HuggingFaceTokenizer(Library.from_str(content), output, content.encode)
    if output.suffix == ".txt":
        words = sorted(library.get_vocab().items(), key=lambda item: item[1])
        return Trained(tokenizer, "".join(f"{word}\n" for word, _ in words).encode())
    return Trained(tokenizer, with_classification_tokens(library).to_str(pretty=True).encode())


def _train_sentencepiece(settings: TrainingSettings, texts: Iterable[str], output: Path) -> Trained:
    """A model that keeps blanks and characters as they are; <unk>, <s> and </s> are 0, 1 and 2."""
    from sentencepiece import SentencePieceTrainer

    smallest, parts = smallest_vocabulary(settings)
    if settings.vocab_size < smallest:
        raise ValueError(f"--vocab-size {settings.vocab_size} is too small: {parts} need {smallest}.")
    model = io.BytesIO()
    failures: list[Exception] = []

    def sentences() -> Iterator[str]:
        # The library would make an error of its own of a bad document, with the places in this code.
        try:
            yield from _sentences(texts)
        except Exception as error:
            failures.append(error)
            raise

    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type=settings.kind.removeprefix("sentencepiece-"),
            vocab_size=settings.vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=list(settings.special_tokens),
            byte_fallback=settings.byte_fallback,
            character_coverage=settings.character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * LONGEST_SENTENCE,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if failures:
            raise failures[0] from None
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"SentencePiece cannot train {settings.vocab_size} tokens on this text: {reason}.") from None
    return Trained(SentencePieceTokenizer(output, model.getvalue()), model.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts, long ones in parts; SentencePiece knows no line breaks within a sentence."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST_SENTENCE):
                # Sentences with a zero byte would be left out.
                yield line[start : start + LONGEST_SENTENCE].replace("\0", " ")


def _without(tokens: tuple[str, ...], known: tuple[str, ...]) -> list[str]:
    return [token for token in tokens if token not in known]
