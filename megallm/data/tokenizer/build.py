"""The tokenizer that some settings name. The libraries are imported when a tokenizer is built."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path

from megallm.config.tree import DataConfig
from megallm.data.tokenizer import huggingface, special_tokens
from megallm.data.tokenizer.base import Tokenizer, TokenizerSettings
from megallm.data.tokenizer.fast import with_fast_library
from megallm.data.tokenizer.huggingface import HuggingFaceTokenizer
from megallm.data.tokenizer.null import NullTokenizer
from megallm.data.tokenizer.sentencepiece import ExtendedSentencePieceTokenizer, SentencePieceTokenizer
from megallm.data.tokenizer.tiktoken import TikTokenizer


def build_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer that the settings name.

    Raises:
        ValueError: the type is not known, a file is missing or broken, or has no token that ends a document.
    """
    kind = settings.tokenizer_type
    build = BUILDERS.get(kind)
    if build is None:
        close = get_close_matches(kind, TOKENIZER_TYPES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"There is no tokenizer type {kind!r}; known are {', '.join(TOKENIZER_TYPES)}.{hint}")
    if settings.vocab_extra_ids and kind not in EXTENDED_TYPES:
        raise ValueError(
            f"--vocab-extra-ids {settings.vocab_extra_ids} does not act on {kind}, only on "
            f"{', '.join(EXTENDED_TYPES)}: leave it out, or add the tokens to the tokenizer's own file."
        )
    return with_fast_library(build(settings), settings.fast_tokenizer)


def settings_of(data: DataConfig, vocab_size: int | None = None) -> TokenizerSettings:
    """The tokenizer that a run's configuration names, of a model with `vocab_size` tokens if that was given."""
    assert data.tokenizer_type is not None, "a kind of tokenizer is named"
    return TokenizerSettings(
        data.tokenizer_type,
        data.tokenizer_model,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
        vocab_size=vocab_size,
        vocab_extra_ids=data.vocab_extra_ids,
        tokenizer_sentencepiece_legacy=data.tokenizer_sentencepiece_legacy,
        null_tokenizer_eod_id=data.null_tokenizer_eod_id,
        tiktoken_pattern=data.tiktoken_pattern,
        tiktoken_num_special_tokens=data.tiktoken_num_special_tokens,
        tiktoken_special_tokens=tuple(data.tiktoken_special_tokens) or None,
    )


def _huggingface(settings: TokenizerSettings) -> Tokenizer:
    """A tokenizer.json, or what a folder holds: that, or the files of GPT-2, of SentencePiece or of BERT."""
    path = _model(settings)
    if not path.is_dir() or (path / "tokenizer.json").is_file():
        return huggingface.read_tokenizer_json(path / "tokenizer.json" if path.is_dir() else path)
    config = special_tokens.read_config(path / "tokenizer_config.json")
    named = special_tokens.named_tokens(config)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        huggingface.check_class(path, config, huggingface.GPT2_CLASSES, "vocab.json and merges.txt")
        return _gpt2_of(path / "vocab.json", path / "merges.txt", named)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    if (path / "vocab.txt").is_file():
        huggingface.check_class(path, config, huggingface.BERT_CLASSES, "vocab.txt")
        vocab_file, lower_case = path / "vocab.txt", bool(config.get("do_lower_case", True))
        library = huggingface.with_classification_tokens(huggingface.wordpiece_library(vocab_file, lower_case))
        rules = f"lower case {lower_case}, with [CLS] and [SEP]"
        return HuggingFaceTokenizer(library, vocab_file, lambda: _content(rules, vocab_file), named)
    raise ValueError(
        f"There is no tokenizer file in {path}: a tokenizer.json, vocab.json with merges.txt, tokenizer.model or "
        f"vocab.txt."
    )


def _sentencepiece(settings: TokenizerSettings) -> Tokenizer:
    path = _in_folder(_model(settings), "tokenizer.model")
    if settings.tokenizer_sentencepiece_legacy or settings.vocab_extra_ids:
        return ExtendedSentencePieceTokenizer(path, settings.vocab_extra_ids)
    return SentencePieceTokenizer(path)


def _plain_sentencepiece(settings: TokenizerSettings) -> Tokenizer:
    return SentencePieceTokenizer(_in_folder(_model(settings), "tokenizer.model"))


def _gpt2(settings: TokenizerSettings) -> Tokenizer:
    if settings.vocab_file and settings.merge_file:
        vocab_file, merge_file = Path(settings.vocab_file), Path(settings.merge_file)
    elif settings.tokenizer_model and not settings.vocab_file and not settings.merge_file:
        folder = Path(settings.tokenizer_model)
        vocab_file, merge_file = folder / "vocab.json", folder / "merges.txt"
    else:
        raise ValueError(
            "GPT2BPETokenizer needs --vocab-file vocab.json and --merge-file merges.txt, or --tokenizer-model with the "
            "folder that holds both."
        )
    return _gpt2_of(vocab_file, merge_file, {})


def _gpt2_of(vocab_file: Path, merge_file: Path, named: Mapping[str, str]) -> Tokenizer:
    library = huggingface.gpt2_library(vocab_file, merge_file)
    return HuggingFaceTokenizer(library, vocab_file, lambda: _content("GPT-2", vocab_file, merge_file), named)


def _wordpiece(settings: TokenizerSettings, lower_case: bool) -> Tokenizer:
    """BERT's WordPiece with [BOS] and [EOS] after its vocabulary, as Megatron appends them, then the sentinels."""
    given = settings.vocab_file or settings.tokenizer_model
    if given is None:
        raise ValueError(f"{settings.tokenizer_type} needs --vocab-file, the path of its vocab.txt.")
    path = _in_folder(Path(given), "vocab.txt")
    library = huggingface.wordpiece_library(path, lower_case)
    sentinels = [f"<extra_id_{number}>" for number in range(settings.vocab_extra_ids)]
    huggingface.append_tokens(library, ["[BOS]", "[EOS]", *sentinels])
    rules = f"lower case {lower_case}, with [BOS], [EOS] and {settings.vocab_extra_ids} sentinels"
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]"}
    return HuggingFaceTokenizer(library, path, lambda: _content(rules, path), named)


def _null(settings: TokenizerSettings) -> Tokenizer:
    if settings.vocab_size is None:
        raise ValueError("NullTokenizer needs --vocab-size, the number of its tokens.")
    return NullTokenizer(settings.vocab_size, settings.null_tokenizer_eod_id)


def _model(settings: TokenizerSettings) -> Path:
    if settings.tokenizer_model is None:
        raise ValueError(f"{settings.tokenizer_type} needs --tokenizer-model, the path of its file.")
    return Path(settings.tokenizer_model)


def _content(rules: str, *files: Path) -> bytes:
    """What defines a tokenizer of several files: its rules and theirs."""
    return b"\n".join([rules.encode(), *(file.read_bytes() for file in files)])


def _in_folder(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path


# Megatron's names.
BUILDERS: dict[str, Callable[[TokenizerSettings], Tokenizer]] = {
    "HuggingFaceTokenizer": _huggingface,
    "SentencePieceTokenizer": _sentencepiece,
    "GPTSentencePieceTokenizer": _plain_sentencepiece,
    "Llama2Tokenizer": _plain_sentencepiece,
    "GPT2BPETokenizer": _gpt2,
    "TikTokenizer": lambda settings: TikTokenizer(_model(settings), settings),
    "BertWordPieceLowerCase": lambda settings: _wordpiece(settings, lower_case=True),
    "BertWordPieceCase": lambda settings: _wordpiece(settings, lower_case=False),
    "NullTokenizer": _null,
}
TOKENIZER_TYPES = tuple(BUILDERS)
EXTENDED_TYPES = ("SentencePieceTokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")
