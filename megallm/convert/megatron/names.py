"""Names of Megatron-LM's tensors, what they are made of, and how tensor ranks share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megallm.config.resolve import num_query_groups
from megallm.config.tree import ModelConfig
from megallm.convert.family import HeadByHead, head_by_head
from megallm.convert.stored import Part, Stored, cut_columns, cut_rows, whole_part

Shapes = Mapping[str, tuple[int, ...]]

TRANSFORMER_ENGINE, LOCAL = "transformer_engine", "local"


@dataclass(frozen=True)
class Module:
    """A module of theirs.

    Attributes:
        rule: what its weight is made of.
        cut: "rows", "columns", or "" where every tensor rank has it whole; a bias of columns is whole.
    """

    rule: str | tuple[str, ...] | HeadByHead
    cut: str = ""


_QKV = HeadByHead("attention.query", "attention.key", "attention.value")
# In a layer.
MODULES: Mapping[str, Module] = {
    "input_layernorm": Module("attention_norm"),
    "self_attention.linear_qkv": Module(_QKV, "rows"),
    "self_attention.q_layernorm": Module("attention.query_norm"),
    "self_attention.k_layernorm": Module("attention.key_norm"),
    "self_attention.linear_proj": Module("attention.output", "columns"),
    "pre_mlp_layernorm": Module("mlp_norm"),
    # A rank has its rows of the gate, then its rows of the other.
    "mlp.linear_fc1": Module(("mlp.gate", "mlp.up"), "rows"),
    "mlp.linear_fc2": Module("mlp.down", "columns"),
}
FIRST: Mapping[str, Module] = {
    "embedding.word_embeddings": Module("embedding.word", "rows"),
    "embedding.position_embeddings": Module("embedding.position"),
    "embedding.tokentype_embeddings": Module("embedding.type"),
}
# A decoder has the first two alone.
LAST: Mapping[str, Module] = {
    "final_layernorm": Module("final_norm"),
    "output_layer": Module("output", "rows"),
    "lm_head.dense": Module("head.transform"),
    "lm_head.layer_norm": Module("head.norm"),
    "pooler.dense": Module("pooler"),
    "binary_head": Module("next_sentence"),
}
# Transformer Engine keeps the norms before its linear layers in these.
_IN_ENGINE = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def stack_of(model: ModelConfig) -> str:
    """What the layers are called, there and here."""
    return "encoder" if model.architecture == "bert" else "decoder"


def in_engine(name: str) -> str:
    """The name that Transformer Engine gives to a tensor of the local implementation."""
    for local, engine in _IN_ENGINE.items():
        name = name.replace(local, engine)
    return name


def layer_tensors(model: ModelConfig, shapes: Shapes, layer: int, tp: int, rank: int) -> Iterator[Stored]:
    """A tensor rank's part of a layer, under names without the layer, as the local implementation has them."""
    for name, module in MODULES.items():
        yield from _tensors(name, module, f"{stack_of(model)}.layers.{layer}.", model, shapes, tp, rank, 0)


def first_tensors(model: ModelConfig, shapes: Shapes, padded_size: int, tp: int, rank: int) -> Iterator[Stored]:
    """A tensor rank's part of what comes before the layers."""
    for name, module in FIRST.items():
        yield from _tensors(name, module, "", model, shapes, tp, rank, padded_size)


def last_tensors(
    model: ModelConfig, shapes: Shapes, padded_size: int, tp: int, rank: int, *, repeats_embedding: bool
) -> Iterator[Stored]:
    """A tensor rank's part of what comes after them; with tied weights the last of several stages has a copy."""
    for name, module in LAST.items():
        scope = f"{stack_of(model)}." if name == "final_layernorm" else ""
        yield from _tensors(scope + name, module, scope, model, shapes, tp, rank, padded_size)
        if name == "output_layer" and repeats_embedding:
            copy = replace(module, rule="embedding.word")
            yield from _tensors(name, copy, "", model, shapes, tp, rank, padded_size)


def _tensors(
    name: str, module: Module, scope: str, model: ModelConfig, shapes: Shapes, tp: int, rank: int, padded_size: int
) -> Iterator[Stored]:
    rule = module.rule
    for suffix in ("weight", "bias"):
        if isinstance(rule, HeadByHead):
            ours = [rule.query, rule.key, rule.value]
        else:
            ours = [rule] if isinstance(rule, str) else list(rule)
        names = [full for one in ours if (full := f"{scope}{one}.{suffix}") in shapes]
        if not names:
            continue
        wholes = [whole_part(one, shapes[one]) for one in names]
        is_bias_of_columns = module.cut == "columns" and suffix == "bias"
        yield _cut(
            f"{name}.{suffix}",
            wholes,
            replace(module, cut="" if is_bias_of_columns else module.cut),
            model,
            tp,
            rank,
            padded_size,
        )


def _cut(
    name: str, wholes: list[Part], module: Module, model: ModelConfig, tp: int, rank: int, padded_size: int
) -> Stored:
    if isinstance(module.rule, HeadByHead):
        joined = Stored(name, head_by_head(wholes, num_query_groups(model)))
        rows = joined.shape[0] // tp
        return cut_rows(joined, rank * rows, (rank + 1) * rows)
    if module.cut == "columns":
        columns = wholes[0].shape[1] // tp
        return cut_columns(Stored(name, tuple(wholes)), rank * columns, (rank + 1) * columns)
    if module.cut == "rows":
        parts: list[Part] = []
        padding = 0
        for whole in wholes:
            # A vocabulary has more rows in the file than in truth.
            rows = max(padded_size, whole.shape[0]) // tp
            piece = cut_rows(Stored(name, (whole,)), rank * rows, (rank + 1) * rows)
            parts += piece.parts
            padding += piece.padding
        return Stored(name, tuple(parts), padding)
    return Stored(name, tuple(wholes))


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding in Megatron's files: the next multiple of `divisible_by` x tensor ranks."""
    unit = divisible_by * tp
    return -(-vocab_size // unit) * unit
