"""The tree as a flat list of fields, and the conversion of one value to the type of its field."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from megallm.config.tree import Config

REQUIRED = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "training.micro_batch_size",
    "training.train_iters",
    "optimizer.lr",
    "data.seq_length",
    "data.tokenizer_type",
)
"""Fields without a default that could serve anybody; 0 or None there means "not given"."""


@dataclass(frozen=True)
class Field:
    """One field of the tree: where it stands, what it holds, and how the command line names it."""

    section: str
    name: str
    kind: type  # int, float, str, bool, or list (of str)
    optional: bool
    default: Any
    flag: str
    off_flag: str | None
    help: str
    choices: tuple[Any, ...] | None

    @cached_property
    def path(self) -> str:
        """`section.name`, the field's name in error messages and in the YAML file."""
        return f"{self.section}.{self.name}"

    def of(self, config: Config) -> Any:
        """Its value in `config`."""
        return getattr(getattr(config, self.section), self.name)


@lru_cache(maxsize=1)
def all_fields() -> tuple[Field, ...]:
    """Every field of the tree, in its order there."""
    found = []
    for section, section_class in sections():
        hints, defaults = get_type_hints(section_class), section_class()
        for entry in fields(section_class):
            kind, optional = _kind(hints[entry.name])
            default = getattr(defaults, entry.name)
            found.append(Field(section, entry.name, kind, optional, default, **entry.metadata))
    return tuple(found)


@lru_cache(maxsize=1)
def sections() -> tuple[tuple[str, type], ...]:
    """The sections of the tree: their names and their dataclasses."""
    return tuple(get_type_hints(Config).items())


def from_text(entry: Field, text: str) -> Any:
    """The value of one word of the command line for a field that is no switch. Raises ValueError with a sentence."""
    if entry.kind is int:
        value: Any = _int_from_text(text)
    elif entry.kind is float:
        value = _float_from_text(text)
    else:
        value = text
    if entry.choices is not None and value not in entry.choices:
        raise ValueError(not_a_choice(value, entry.choices))
    return value


def from_plain(entry: Field, value: Any) -> Any:
    """The value of a field from a plain Python value, as YAML and JSON give it. Raises ValueError with a sentence.

    YAML 1.1 reads 1e-4 as a string, since it wants 1.0e-4 for a number; such strings are taken as the numbers they are.
    """
    if value is None:
        if entry.optional:
            return None
        raise ValueError(f"takes {_NOUNS[entry.kind]}, not an empty value")
    if entry.kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            return _float_from_text(value)
    elif entry.kind is list:
        if isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in value):
            return [str(part) for part in value]
    elif isinstance(value, entry.kind) and not (entry.kind is int and isinstance(value, bool)):
        if entry.choices is not None and value not in entry.choices:
            raise ValueError(not_a_choice(value, entry.choices))
        return value
    raise ValueError(f"takes {_NOUNS[entry.kind]}, not {value!r}")


def not_a_choice(value: Any, choices: tuple[Any, ...]) -> str:
    """Why `value` is refused where only `choices` are known, with the nearest of them."""
    return f"takes one of {', '.join(map(str, choices))}, not {value!r}{nearest_hint(str(value), map(str, choices))}"


def nearest_hint(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known words, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


_NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list of texts"}


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of a field without its None, and whether it may be None."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        assert len(inner) == 1, f"a field holds one type or None, not {hint}"
        return inner[0], True
    return get_origin(hint) or hint, False


def _int_from_text(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"takes a whole number, not {text!r}") from None
    hint = f"; write {int(number)}" if number.is_integer() else ""
    raise ValueError(f"takes a whole number, not {text!r}{hint}")


def _float_from_text(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"takes a number, not {text!r}") from None
