"""The same tokenizer in gigatoken, a much faster library that reads byte-level BPE and BPE models of SentencePiece."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import numpy as np

from megallm.data.tokenizer.base import Tokenizer
from megallm.data.tokenizer.huggingface import HuggingFaceTokenizer
from megallm.data.tokenizer.sentencepiece import SentencePieceTokenizer
from megallm.data.tokenizer.unicode_versions import composes_by_version


class FastLibrary(Protocol):
    """What is used of gigatoken."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, uint32 [ids]."""

    def encode_batch(self, texts: list[str], *, parallel: bool) -> Any:
        """Ids of texts, as an awkward array."""


class Gigatoken(NamedTuple):
    """Name and version of gigatoken; what makes the tokenizer in it; for which texts its ids are known to differ.

    `load` raises ValueError if gigatoken does not read the tokenizer. `differs_on` is None where no such text is known.
    """

    name: str
    load: Callable[[], FastLibrary]
    differs_on: Callable[[str], bool] | None


def find_gigatoken(reference: Tokenizer) -> Gigatoken:
    """What makes the same tokenizer in gigatoken.

    Raises:
        ValueError: it is not installed, or does not know tokenizers of this kind.
    """
    try:
        import gigatoken
    except ImportError:
        raise ValueError("gigatoken is not installed: pip install gigatoken.") from None

    def refused(error: BaseException) -> ValueError:
        reason = " ".join(str(error).split("\n\n")[0].split()).rstrip(".")
        return ValueError(f"gigatoken does not read {reference.source or reference.kind}: {reason}.")

    try:
        content = _tokenizer_json(reference)
    except Exception as error:  # it has no class of its own
        raise refused(error) from None

    def load() -> FastLibrary:
        try:
            return gigatoken.Tokenizer.from_json(content).backend
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise refused(error) from None

    # The one normalizer that gigatoken takes is NFC; its tables are newer than those of tokenizers.
    normalizes = json.loads(content).get("normalizer") is not None
    differs_on = composes_by_version if normalizes and isinstance(reference, HuggingFaceTokenizer) else None
    return Gigatoken(f"gigatoken {version('gigatoken')}", load, differs_on)


def _tokenizer_json(reference: Tokenizer) -> str:
    if isinstance(reference, HuggingFaceTokenizer):
        return reference.serialized()
    if type(reference) is SentencePieceTokenizer:
        return _sentencepiece_json(reference)
    raise ValueError(f"it knows no tokenizers of the kind {reference.kind}")


def _sentencepiece_json(reference: SentencePieceTokenizer) -> str:
    """The model as gigatoken converts it to a tokenizer.json, without the control tokens, which no text gives.

    gigatoken takes `<s>` in a text for the token of that name; for SentencePiece it is three characters.
    """
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    content = json.loads(sentencepiece_to_tokenizer_json(reference.model))
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    return json.dumps(content)
