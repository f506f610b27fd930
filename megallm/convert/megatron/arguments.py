"""The command line that Megatron-LM keeps in its checkpoints, and our settings of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megallm.config.resolve import attention_window, ffn_hidden_size, kv_channels, num_query_groups, num_token_types
from megallm.config.tree import DataConfig, ModelConfig
from megallm.convert.family import OF_TRAINING
from megallm.convert.model import model_of
from megallm.convert.pickled import Made
from megallm.convert.tokenizer_files import tokenizer_settings

# Settings with one name and one meaning in both.
SAME = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "normalization",
    "norm_epsilon",
    "apply_layernorm_1p",
    "qk_layernorm",
    "apply_residual_connection_post_layernorm",
    "add_bias_linear",
    "add_qkv_bias",
)
# What the rest of ours follows from.
_OTHERS = (
    "ffn_hidden_size",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "activation",
    "tie_embeddings",
    "window_size",
    "vocab_size",
    "architecture",
    "bert_binary_head",
    "num_token_types",
)
# What the model would lose: theirs by name, and the value with which ours computes the same.
_LACKING = {
    "num_experts": (None, "a mixture of experts"),
    "multi_latent_attention": (False, "multi-head latent attention"),
    "mtp_num_layers": (None, "prediction of several tokens"),
    "apply_query_key_layer_scaling": (False, "attention scores divided by the number of the layer"),
    "heterogeneous_layers_config_path": (None, "layers of several shapes"),
    "hybrid_override_pattern": (None, "Mamba layers"),
    "softmax_type": ("vanilla", "attention sinks"),
    "use_mup": (False, "maximal update parametrisation"),
    "no_rope_freq": (None, "layers without positions"),
    "window_attn_skip_freq": (None, "layers without a window"),
    "is_hybrid_model": (False, "Mamba layers"),
}
_ACTIVATIONS = {"swiglu": "swiglu", "squared_relu": "squared_relu", "openai_gelu": "gelu_tanh"}
_POSITIONS = ("learned_absolute", "rope", "none")


def arguments_in(content: Any, folder: Path) -> tuple[dict[str, Any], int]:
    """The arguments and the iteration that a file of a checkpoint in `folder` holds.

    Raises ValueError where there are none.
    """
    arguments = content.get("args") if isinstance(content, dict) else None
    if not isinstance(arguments, Made) or not isinstance(arguments.state, dict):
        raise ValueError(f"{folder} does not say with which arguments its model was built: there are no args in it")
    iteration = content.get("iteration")
    return arguments.state, iteration if isinstance(iteration, int) else 0


def data_of(given: Mapping[str, Any], kept: Path) -> DataConfig:
    """Our settings of the data of a command line, with the tokenizer in the folder `kept`, if there is one."""
    length = given.get("seq_length")
    return DataConfig(seq_length=length if isinstance(length, int) else 0, **tokenizer_settings(kept))


def architecture_of(names: Iterable[str]) -> str:
    """What model tensors of these names are: their arguments do not say it."""
    return "bert" if any(name.startswith("encoder.") for name in names) else "gpt"


def true_vocab_size(given: Mapping[str, Any], num_rows: int, asked: int | None) -> tuple[int, tuple[str, ...]]:
    """Size of the vocabulary without padding, of an embedding of `num_rows`, and sentences about it for the user.

    It is what the user has `asked` for, else what the arguments say, else the padded one.

    Raises ValueError where the embedding has fewer rows.
    """
    told = given.get("vocab_size")
    if told is not None and not isinstance(told, int):
        raise ValueError(f"the checkpoint's arguments say that vocab_size is {told!r}, which is no number")
    size = asked or told or num_rows
    if size > num_rows:
        raise ValueError(f"a vocabulary of {size} is larger than the {num_rows} rows of the embedding")
    if told and size < told:
        lost = "token" if told - size == 1 else f"{told - size} tokens"
        return size, (f"--true-vocab-size {size} leaves the last {lost} of the {told} behind that the arguments name",)
    return size, ()


def read_arguments(given: Mapping[str, Any], vocab_size: int, architecture: str = "gpt") -> ModelConfig:
    """Our settings of the model of a command line.

    Raises ValueError, naming the feature, for what we do not have.
    """
    lost = [
        f"{name} = {given[name]!r} ({meaning})"
        for name, (value, meaning) in _LACKING.items()
        if given.get(name) not in (None, value)
    ]
    kind = given.get("position_embedding_type", "learned_absolute")
    if kind not in _POSITIONS:
        lost.append(f"position_embedding_type = {kind!r} (known are {', '.join(_POSITIONS)})")
    if lost:
        raise ValueError(f"the checkpoint uses what megallm does not have: {'; '.join(lost)}")
    is_grouped = bool(given.get("group_query_attention"))
    needed = ("num_layers", "hidden_size", "num_attention_heads", *(("num_query_groups",) if is_grouped else ()))
    missing = [name for name in needed if given.get(name) is None]
    if missing:
        raise ValueError(f"the checkpoint's arguments lack {', '.join(missing)}")
    values = {name: given[name] for name in SAME if given.get(name) is not None}
    heads = given["num_attention_heads"]
    window = given.get("window_size")
    epsilon = given.get("norm_epsilon", given.get("layernorm_epsilon"))
    # Decoders are saved with BERT's default, too.
    has_binary_head = architecture == "gpt" or bool(given.get("bert_binary_head", True))
    settings = values | {
        "architecture": architecture,
        "bert_binary_head": has_binary_head,
        "ffn_hidden_size": given.get("ffn_hidden_size"),
        "group_query_attention": is_grouped,
        "num_query_groups": given["num_query_groups"] if is_grouped else heads,
        "kv_channels": given.get("kv_channels"),
        "activation": _activation(given),
        "tie_embeddings": not given.get("untie_embeddings_and_output_weights", False),
        "window_size": ",".join(map(str, window)) if isinstance(window, list | tuple) else window,
        "vocab_size": vocab_size,
    }
    return model_of(
        settings | ({} if epsilon is None else {"norm_epsilon": epsilon}), "the model of the checkpoint's arguments"
    )


def _activation(given: Mapping[str, Any]) -> str:
    """Fused with its bias, which is the default there, GELU is its approximation by tanh."""
    for theirs, ours in _ACTIVATIONS.items():
        if given.get(theirs):
            return ours
    is_fused = given.get("bias_gelu_fusion", True) and given.get("add_bias_linear", True)
    return "gelu_tanh" if is_fused else "gelu"


def write_arguments(model: ModelConfig) -> dict[str, Any]:
    """Their arguments of a model of ours, resolved.

    Raises ValueError, naming all of them, for settings that they do not have.
    """
    default = ModelConfig()
    known = {*SAME, *_OTHERS, *OF_TRAINING}
    lost = [
        f"{entry.name} {getattr(model, entry.name)!r}"
        for entry in fields(ModelConfig)
        if entry.name not in known and getattr(model, entry.name) != getattr(default, entry.name)
    ]
    if num_token_types(model) != num_token_types(replace(model, num_token_types=None)):
        lost.append(f"num_token_types {model.num_token_types}")
    if model.activation not in (*_ACTIVATIONS.values(), "gelu"):
        lost.append(f"activation {model.activation!r}")
    if model.position_embedding_type not in _POSITIONS:
        lost.append(f"position_embedding_type {model.position_embedding_type!r}")
    if lost:
        raise ValueError(f"Megatron-LM does not have this model's {', '.join(lost)}")
    groups, before = num_query_groups(model), attention_window(model)
    return {
        **{name: getattr(model, name) for name in SAME},
        "ffn_hidden_size": ffn_hidden_size(model),
        "group_query_attention": groups != model.num_attention_heads,
        "num_query_groups": groups,
        "kv_channels": kv_channels(model),
        **{theirs: model.activation == ours for theirs, ours in _ACTIVATIONS.items()},
        "bias_gelu_fusion": False,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "bert_binary_head": model.bert_binary_head,
        "window_size": None if before is None else (before, 0),
        "vocab_size": model.vocab_size,
        "add_position_embedding": model.position_embedding_type == "learned_absolute",
        "make_vocab_size_divisible_by": 128,
    }
