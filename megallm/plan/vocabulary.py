"""Sizes of vocabularies: as the files of tokenizers tell them, read without their libraries, or the usual ones."""

from __future__ import annotations

import json
from pathlib import Path

from megallm.config.tree import DataConfig

USUAL_SIZES = {
    "GPT2BPETokenizer": 50257,
    "Llama2Tokenizer": 32000,
    "BertWordPieceLowerCase": 30522 + 2,
    "BertWordPieceCase": 28996 + 2,
}
"""Of the tokenizers that nearly always come with the same files. [BOS] and [EOS] are appended to BERT's."""
_JSON, _NUMBERED, _SENTENCEPIECE, _LIST = "tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt"


def size_of_tokenizer(data: DataConfig) -> int | None:
    """The number of tokens of a run's tokenizer by its files; None where they are not here or do not tell it alone."""
    named = data.tokenizer_model or data.vocab_file
    if named is None or data.vocab_extra_ids or data.tokenizer_sentencepiece_legacy:
        return None
    path = Path(named)
    try:
        if path.is_dir():
            return size_in_folder(path) or None
        if data.vocab_file and path.suffix == ".txt":
            words = _words(path)
            return len(words) + sum(name not in words for name in ("[BOS]", "[EOS]"))
        kinds = {".json": _NUMBERED if data.vocab_file else _JSON, ".model": _SENTENCEPIECE, ".txt": _LIST}
        return _size(path, kinds[path.suffix])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None


def size_in_folder(folder: Path) -> int:
    """One more than the highest id of the tokenizer in a folder; 0 where there is none.

    Raises one of several errors where its file is not what its name says.
    """
    for kind in (_JSON, _NUMBERED, _SENTENCEPIECE, _LIST):
        if (folder / kind).exists():
            return _size(folder / kind, kind)
    return 0


def _size(path: Path, kind: str) -> int:
    if kind == _SENTENCEPIECE:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    if kind == _LIST:
        return len(_words(path))
    content = json.loads(path.read_bytes())
    if kind == _NUMBERED:
        return max(content.values()) + 1
    vocabulary = content["model"]["vocab"]
    # Unigram models list their tokens, others number them.
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
    added = [token["id"] for token in content.get("added_tokens") or []]
    return max([*ids, *added], default=-1) + 1


def _words(path: Path) -> list[str]:
    # Not by all that Python takes for the end of a line: some of it is in vocabularies.
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
