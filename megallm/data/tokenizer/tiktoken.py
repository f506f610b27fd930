"""Rank files of tiktoken, and lists of tokens as Megatron and Mistral write them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megallm.data.tokenizer.base import Tokenizer, TokenizerSettings
from megallm.data.tokenizer.special_tokens import PADDING_TOKENS, find_end_token, find_token

_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{suffix}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{suffix}"
)
_ENGLISH_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# How text is cut into words before merging: v1 and v2 as Megatron's --tiktoken-pattern, the others by the name of the
# vocabulary that each was published with.
PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": _CASED.replace("{suffix}", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": _CASED.replace("{suffix}", _ENGLISH_SUFFIXES + "?")
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": _ENGLISH_SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# What the published rank files do not say themselves: pattern and special tokens.
PUBLISHED: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": ("gpt2", {"<|endoftext|>": 50256}),
    "p50k_base": ("gpt2", {"<|endoftext|>": 50256}),
    "cl100k_base": (
        "cl100k",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": ("o200k", {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "qwen": ("qwen", {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
}
# Of a list of tokens: Megatron's, in their order there.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
LARGEST_DEFAULT_VOCABULARY = 2**17


class TikTokenizer(Tokenizer):
    """A vocabulary in tiktoken's form. Texts of special tokens in a document are text like any other.

    A rank file (`.tiktoken`, a line `base64 rank` for each token) keeps its ids, special tokens come after them. A list
    of tokens (`.json`) is cut to the vocabulary's size, and its ids come after `tiktoken_num_special_tokens` ones that
    are set aside.
    """

    kind = "tiktoken"

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ValueError("TikTokenizer needs the package tiktoken: pip install tiktoken.") from None
        if not path.is_file():
            raise ValueError(f"There is no tokenizer file {path}: TikTokenizer needs a .tiktoken or .json file.")
        read = _read_list if path.suffix == ".json" else _read_ranks
        self._pattern, self._ranks, self._special = read(path, settings)
        try:
            self._library = tiktoken.Encoding(
                path.stem, pat_str=self._pattern, mergeable_ranks=self._ranks, special_tokens=self._special
            )
        except BaseException as error:  # a panic of the library is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ValueError(f"{path} is no vocabulary for tiktoken: {error}.") from None
        self.source = str(path)
        self.library = f"tiktoken {version('tiktoken')}"
        self.vocab_size = max(*self._ranks.values(), *self._special.values()) + 1
        self.eod_id = find_end_token(self._special, "</s>", self.source)
        self.bos_id = find_token(self._special, ("<s>", "<|begin_of_text|>"))
        self.pad_id = find_token(self._special, PADDING_TOKENS)
        self.cls_id, self.sep_id = self._special.get("<cls>"), self._special.get("<sep>")
        self.mask_id = self._special.get("<mask>")

    def encode(self, text: str) -> list[int]:
        return self._library.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._library.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode([int(number) for number in ids])

    def token_text(self, token_id: int) -> str:
        return self._library.decode_single_token_bytes(token_id).decode("utf-8", errors="replace")

    def definition(self) -> bytes:
        ranks = b"\n".join(b"%d %s" % (rank, base64.b64encode(token)) for token, rank in self._ranks.items())
        return b"\n".join([self._pattern.encode(), json.dumps(self._special, sort_keys=True).encode(), ranks])


def _read_ranks(path: Path, settings: TokenizerSettings) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Pattern, id of each token, and special tokens of a rank file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: no token and rank of tiktoken.") from None
    if not ranks:
        raise ValueError(f"{path} holds no tokens.")
    published_pattern, published_special = PUBLISHED.get(path.stem, (None, None))
    pattern = settings.tiktoken_pattern or published_pattern
    if pattern is None:
        raise ValueError(
            f"{path} does not say how text is cut into words: give --tiktoken-pattern, one of {', '.join(PATTERNS)}."
        )
    if settings.tiktoken_special_tokens:
        first = max(ranks.values()) + 1
        special = {text: first + number for number, text in enumerate(settings.tiktoken_special_tokens)}
    elif published_special is not None:
        special = published_special
    else:
        raise ValueError(
            f"{path} holds no special tokens: name them in their order, --tiktoken-special-tokens TEXT ..."
        )
    return _pattern(pattern), ranks, special


def _read_list(path: Path, settings: TokenizerSettings) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Pattern, id of each token, and special tokens of a list of tokens: Megatron's bare one, or Mistral's."""
    try:
        content = json.loads(path.read_bytes())
        config: Mapping[str, Any] = content["config"] if isinstance(content, dict) else {}
        entries = content["vocab"] if isinstance(content, dict) else content
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        in_order = [entry["rank"] for entry in entries] == list(range(len(entries)))
        in_file = content.get("special_tokens") if isinstance(content, dict) else None
        named = [entry["token_str"] for entry in sorted(in_file, key=lambda entry: entry["rank"])] if in_file else None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no list of tokens with rank and token_bytes: {reason}.") from None
    if not in_order:
        raise ValueError(f"{path}: the ranks do not count up from 0.")
    num_special = settings.tiktoken_num_special_tokens
    names = list(settings.tiktoken_special_tokens or named or SPECIAL_TOKENS)
    if len(set(names)) < len(names):
        raise ValueError(f"--tiktoken-special-tokens {' '.join(names)} names a token twice.")
    if len(names) > num_special:
        raise ValueError(
            f"{path} has {len(names)} special tokens, more than the {num_special} ids that are set aside for them: "
            f"give --tiktoken-num-special-tokens {len(names)} or more."
        )
    names += [f"<SPECIAL_{number}>" for number in range(len(names), num_special)]
    default = config.get("default_vocab_size", LARGEST_DEFAULT_VOCABULARY)
    wanted = settings.vocab_size or min(default, len(tokens) + num_special)
    if not num_special + 256 <= wanted <= num_special + len(tokens):
        raise ValueError(
            f"--vocab-size {wanted} does not fit {path}: with {num_special} special tokens there is room for "
            f"{num_special + 256} to {num_special + len(tokens)}."
        )
    ranks = {token: num_special + number for number, token in enumerate(tokens[: wanted - num_special])}
    special = {name: number for number, name in enumerate(names)}
    pattern = settings.tiktoken_pattern
    return _pattern(pattern) if pattern else config.get("pattern", PATTERNS["v2"]), ranks, special


def _pattern(name: str) -> str:
    if name not in PATTERNS:
        raise ValueError(f"--tiktoken-pattern is one of {', '.join(PATTERNS)}, not {name!r}.")
    return PATTERNS[name]
