"""What a family of models is: one table of names, one of settings, and what neither can hold.

A module of theirs (`model.layers.{}.self_attn.q_proj`) is made of ours (`decoder.layers.{}.attention.query`), its
weight of their weights and its bias of their biases. Settings are read from `config.json` and written to it by the same
table. What the table does not name must have the value that the architecture implies: else the model is refused, naming
the feature that would be lost.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from megallm.config.resolve import num_query_groups
from megallm.config.tree import ModelConfig
from megallm.convert.model import model_of
from megallm.convert.stored import Part, Stored, whole_part

# Settings that do not change what a trained model computes.
OF_TRAINING = frozenset({"attention_dropout", "hidden_dropout", "init_method_std", "make_vocab_size_divisible_by"})

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rows:
    """The rows of our modules' tensors, one module after another; `transposed`: a matrix is stored as [in, out]."""

    modules: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class HeadByHead:
    """For each key/value head the rows of its query heads, of the key and of the value."""

    query: str
    key: str
    value: str


@dataclass(frozen=True)
class OfNext:
    """Our module `inside` of the layer that follows, and `last` in the last one: norms that end a layer of theirs."""

    inside: str
    last: str


Rule = str | Rows | HeadByHead | OfNext


class Special(ABC):
    """Settings that no table of names can translate: `ours` of the fields of `ModelConfig`."""

    ours: ClassVar[tuple[str, ...]]

    @abstractmethod
    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Our settings. Raises ValueError, naming the feature, for what we do not have."""

    @abstractmethod
    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Theirs. Raises ValueError, naming the feature, for what they do not have."""


@dataclass(frozen=True)
class Family:
    """A family of Hugging Face models.

    Attributes:
        model_type, architecture: as `config.json` names them.
        modules: their modules and what they are made of; `{}` is the number of the layer.
        settings: our settings that they have under another name.
        always: our settings that every model of this architecture has.
        defaults: values of theirs where `config.json` leaves them out, as the library fills them in.
        only: values of theirs without which the model computes something else than ours, and what that is.
        special: settings that need more than a name.
        prefix: begins the names of all but the head; models that were saved without a head leave it away.
        head: their name of the output layer.
        surplus: tensors that hold nothing learned, which older versions saved.
        copies: their tensors that are another one of them, which files leave out or repeat.
        older: endings of names in files of older versions, and what they are now.
        left_behind: tensors of other heads that the architecture has no use for; who reads a model is told.
        may_lack: tensors of ours without which it comes; they begin anew, and who reads a model is told.
        loader: the class of transformers that makes the model, and `logits` what it calls them.
    """

    model_type: str
    architecture: str
    modules: Mapping[str, Rule]
    settings: Mapping[str, str]
    always: Mapping[str, Any]
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    special: tuple[Special, ...] = ()
    prefix: str = ""
    head: str = "lm_head"
    surplus: str = r"(?!)"
    copies: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)
    left_behind: str = r"(?!)"
    may_lack: str = r"(?!)"
    loader: str = "AutoModelForCausalLM"
    logits: str = "logits"

    def read_settings(self, theirs: Mapping[str, Any]) -> ModelConfig:
        """Our settings of the model that a `config.json` describes.

        Raises:
            ValueError: it uses something that we do not have, lacks a setting, or has one that cannot be.
        """
        given = {key: value for key, value in {**self.defaults, **theirs}.items() if value is not None}
        lost = [
            f"{key} = {given[key]!r} ({meaning}; this works with {wanted!r} only)"
            for key, (wanted, meaning) in self.only.items()
            if given.get(key, wanted) != wanted
        ]
        if lost:
            raise ValueError(f"the {self.model_type} model uses what megallm does not have: {'; '.join(lost)}")
        missing = [key for key in self.settings.values() if key not in given]
        if missing:
            raise ValueError(f"config.json of a {self.model_type} model needs {', '.join(missing)}")
        values = {ours: given[key] for ours, key in self.settings.items()} | dict(self.always)
        whose = f"config.json of a {self.model_type} model"
        # The special ones compute with these.
        model_of(values, whose)
        try:
            for special in self.special:
                values |= special.read(given)
        except KeyError as error:
            raise ValueError(f"{whose} needs {error.args[0]}") from None
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{whose} describes none that can be: {error}") from None
        return model_of(values, whose)

    def write_settings(self, model: ModelConfig) -> dict[str, Any]:
        """`config.json`'s entries for a model of ours, resolved.

        Raises:
            ValueError: the architecture lacks something that the model uses; all such things are named.
        """
        wanted = dict(self.always)
        answered = {
            *self.settings,
            *OF_TRAINING,
            "group_query_attention",
            *(name for special in self.special for name in special.ours),
        }
        for entry in fields(ModelConfig):
            if entry.name not in answered:
                # What the family has no name for is what it does not have: the default means that nothing is asked.
                wanted.setdefault(entry.name, entry.default)
        lost = [
            f"{name} {getattr(model, name)!r} (it has {value!r})"
            for name, value in wanted.items()
            if getattr(model, name) != value
        ]
        entries: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        entries |= {key: wanted for key, (wanted, _) in self.only.items()}
        entries |= {key: getattr(model, ours) for ours, key in self.settings.items()}
        for special in self.special:
            try:
                entries |= special.write(model)
            except ValueError as error:
                lost.append(str(error))
        if lost:
            raise ValueError(f"the {self.architecture} architecture does not have this model's {', '.join(lost)}")
        return entries

    def stored(self, model: ModelConfig, shapes: Shapes) -> list[Stored]:
        """The tensors that hold a model, in the order of the model.

        `model`: resolved. `shapes`: of its logical tensors.

        Raises ValueError where the family has no place for one of these.
        """
        found = list(_stored(self.modules, model, shapes))
        placed = {part.name for one in found for part in one.parts}
        homeless = sorted(shapes.keys() - placed)
        if homeless:
            raise ValueError(f"the {self.architecture} architecture has no place for {', '.join(homeless[:3])}")
        return found


def _stored(modules: Mapping[str, Rule], model: ModelConfig, shapes: Shapes) -> Iterator[Stored]:
    """Modules before the layers, the layers one by one, modules after them."""
    in_layers = [name for name in modules if "{}" in name]
    first = list(modules).index(in_layers[0])
    for number, name in enumerate(modules):
        if number == first:
            for layer in range(model.num_layers):
                for inside in in_layers:
                    yield from _of_module(inside, modules[inside], str(layer), model, shapes)
        if "{}" not in name:
            yield from _of_module(name, modules[name], "", model, shapes)


def _of_module(name: str, rule: Rule, layer: str, model: ModelConfig, shapes: Shapes) -> Iterator[Stored]:
    if isinstance(rule, OfNext):
        following = int(layer) + 1
        rule = rule.inside.format(following) if following < model.num_layers else rule.last
    rule = Rows((rule,)) if isinstance(rule, str) else rule
    ours = rule.modules if isinstance(rule, Rows) else (rule.query, rule.key, rule.value)
    for suffix in ("weight", "bias"):
        names = [f"{module.format(layer)}.{suffix}" for module in ours]
        if any(one not in shapes for one in names):
            continue
        wholes = [whole_part(one, shapes[one]) for one in names]
        if isinstance(rule, HeadByHead):
            parts = head_by_head(wholes, num_query_groups(model))
        else:
            parts = tuple(wholes)
        is_transposed = isinstance(rule, Rows) and rule.transposed and suffix == "weight"
        yield Stored(f"{name.format(layer)}.{suffix}", parts, transposed=is_transposed)


def head_by_head(wholes: Sequence[Part], num_groups: int) -> tuple[Part, ...]:
    """Query, key and value cut into equal parts for each key/value head, in the order of `HeadByHead`."""
    parts = []
    for group in range(num_groups):
        for whole in wholes:
            rows = whole.shape[0] // num_groups
            parts.append(Part(whole.name, (group * rows, *whole.offset[1:]), (rows, *whole.shape[1:])))
    return tuple(parts)


def is_surplus(family: Family, name: str) -> bool:
    """Whether a tensor of theirs holds nothing that was learned."""
    return re.fullmatch(family.surplus, name) is not None


def is_left_behind(family: Family, name: str) -> bool:
    """Whether a tensor of theirs is of a head that the architecture does not have."""
    return re.fullmatch(family.left_behind, name) is not None


def may_lack(family: Family, name: str) -> bool:
    """Whether a model may come without a tensor of ours."""
    return re.fullmatch(family.may_lack, name) is not None
