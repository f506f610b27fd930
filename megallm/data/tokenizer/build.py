"""The tokenizer that some settings name. The libraries are imported when a tokenizer is built."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from megallm.data.tokenizer.base import Tokenizer, TokenizerSettings
from megallm.data.tokenizer.huggingface import HuggingFaceTokenizer
from megallm.data.tokenizer.null import NullTokenizer
from megallm.data.tokenizer.sentencepiece import SentencePieceTokenizer

# Megatron's names.
BUILDERS: dict[str, Callable[[TokenizerSettings], Tokenizer]] = {
    "HuggingFaceTokenizer": lambda settings: HuggingFaceTokenizer(_model(settings)),
    "SentencePieceTokenizer": lambda settings: SentencePieceTokenizer(_model(settings)),
    "GPTSentencePieceTokenizer": lambda settings: SentencePieceTokenizer(_model(settings)),
    "Llama2Tokenizer": lambda settings: SentencePieceTokenizer(_model(settings)),
    "NullTokenizer": lambda settings: NullTokenizer(_null_vocabulary(settings)),
}
TOKENIZER_TYPES = tuple(BUILDERS)


def build_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer that the settings name.

    Raises:
        ValueError: the type is not known, a file is missing or broken, or has no token that ends a document.
    """
    build = BUILDERS.get(settings.tokenizer_type)
    if build is None:
        close = get_close_matches(settings.tokenizer_type, TOKENIZER_TYPES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"There is no tokenizer type {settings.tokenizer_type!r}; known are {', '.join(TOKENIZER_TYPES)}.{hint}"
        )
    return build(settings)


def _model(settings: TokenizerSettings) -> Path:
    if settings.tokenizer_model is None:
        raise ValueError(f"{settings.tokenizer_type} needs --tokenizer-model, the path of its file.")
    return Path(settings.tokenizer_model)


def _null_vocabulary(settings: TokenizerSettings) -> int:
    if settings.vocab_size is None:
        raise ValueError("NullTokenizer needs --vocab-size, the number of its tokens.")
    return settings.vocab_size
