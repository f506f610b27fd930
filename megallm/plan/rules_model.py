"""Rules about the shape of the model, by itself and over tensor parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megallm.config.resolve import attention_window, ffn_hidden_size, kv_channels, num_query_groups, rotary_width
from megallm.config.tree import Config, ModelConfig
from megallm.plan.problem import Problem, divisors_near, multiples_near, rule


@rule("model.hidden_size", "model.num_attention_heads", "model.kv_channels")
def heads_divide_hidden_size(config: Config, world_size: int) -> Iterator[Problem]:
    """The width of a head follows from hidden / heads unless it is given."""
    hidden, heads = config.model.hidden_size, config.model.num_attention_heads
    if config.model.kv_channels is None and hidden % heads:
        yield Problem(
            ("--hidden-size", "--num-attention-heads"),
            f"a width of {hidden} cannot be cut into {heads} heads",
            f"{hidden} % {heads} = {hidden % heads}",
            f"use --hidden-size {multiples_near(hidden, heads)}, or --num-attention-heads "
            f"{divisors_near(hidden, heads)}, or give the width of a head with --kv-channels",
        )


@rule("model.num_query_groups", "model.num_attention_heads")
def query_groups_are_asked_for(config: Config, world_size: int) -> Iterator[Problem]:
    """A number of key/value heads without the switch is ignored by Megatron; here it is refused."""
    model = config.model
    if not model.group_query_attention and model.num_query_groups not in (None, model.num_attention_heads):
        yield Problem(
            ("--num-query-groups", "--group-query-attention"),
            f"{model.num_query_groups} key/value heads for {model.num_attention_heads} query heads are given, but "
            "grouped attention is not switched on",
            "",
            f"add --group-query-attention, or leave out --num-query-groups for {model.num_attention_heads}",
        )


@rule("model.num_query_groups")
def query_groups_are_numbered(config: Config, world_size: int) -> Iterator[Problem]:
    """The switch alone means multi-query attention in Megatron, which few who write it expect."""
    if config.model.group_query_attention and config.model.num_query_groups is None:
        yield Problem(
            ("--group-query-attention", "--num-query-groups"),
            "grouped attention is switched on without the number of key/value heads",
            "",
            "add --num-query-groups 8, or --num-query-groups 1 for multi-query attention",
        )


@rule("model.num_query_groups", "model.num_attention_heads")
def query_groups_divide_heads(config: Config, world_size: int) -> Iterator[Problem]:
    """Every key/value head serves equally many query heads."""
    heads, groups = config.model.num_attention_heads, num_query_groups(config.model)
    if heads % groups:
        yield Problem(
            ("--num-attention-heads", "--num-query-groups"),
            f"{heads} query heads cannot share {groups} key/value heads evenly",
            f"{heads} % {groups} = {heads % groups}",
            f"use --num-query-groups {divisors_near(heads, groups)}, or --num-attention-heads "
            f"{multiples_near(heads, groups)}",
        )


@rule("model.num_attention_heads", "parallel.tensor_model_parallel_size")
def tensor_size_divides_heads(config: Config, world_size: int) -> Iterator[Problem]:
    """Each tensor rank computes whole heads."""
    heads, tensor = config.model.num_attention_heads, config.parallel.tensor_model_parallel_size
    if heads % tensor:
        yield Problem(
            ("--num-attention-heads", "--tensor-model-parallel-size"),
            f"{heads} heads cannot be cut over {tensor} tensor ranks",
            f"{heads} % {tensor} = {heads % tensor}",
            f"use --tensor-model-parallel-size {divisors_near(heads, tensor)}, or --num-attention-heads "
            f"{multiples_near(heads, tensor)}",
        )


@rule(
    "model.num_query_groups",
    "model.num_attention_heads",
    "model.hidden_size",
    "model.kv_channels",
    "parallel.tensor_model_parallel_size",
)
def tensor_size_divides_query_groups(config: Config, world_size: int) -> Iterator[Problem]:
    """Where key/value heads do not come out whole on each tensor rank, their channels are cut evenly instead."""
    groups, width = num_query_groups(config.model), _head_width(config.model)
    tensor = config.parallel.tensor_model_parallel_size
    if width is not None and groups % tensor and groups * width % tensor:
        yield Problem(
            ("--num-query-groups", "--kv-channels", "--tensor-model-parallel-size"),
            f"the {groups} x {width} channels of keys cannot be cut over {tensor} tensor ranks",
            f"{groups} % {tensor} = {groups % tensor} and {groups * width} % {tensor} = {groups * width % tensor}",
            f"use --tensor-model-parallel-size {divisors_near(groups * width, tensor)}, or --num-query-groups "
            f"{multiples_near(groups, tensor)}",
        )


@rule("model.hidden_size", "model.ffn_hidden_size", "model.activation")
def default_ffn_is_not_empty(config: Config, world_size: int) -> Iterator[Problem]:
    """The default width of a gated MLP is a multiple of 64, which is none for very narrow models."""
    hidden = config.model.hidden_size
    if ffn_hidden_size(config.model) < 1:
        yield Problem(
            ("--ffn-hidden-size", "--hidden-size"),
            f"the default width of a gated MLP vanishes at a hidden size of {hidden}",
            f"8/3 x {hidden} = {hidden * 8 // 3}, down to a multiple of 64: 0",
            f"give it, for example --ffn-hidden-size {4 * hidden}, or use --hidden-size 24",
        )


@rule("model.hidden_size", "model.ffn_hidden_size", "model.activation", "parallel.tensor_model_parallel_size")
def tensor_size_divides_ffn(config: Config, world_size: int) -> Iterator[Problem]:
    """Each tensor rank computes an equal share of the MLP."""
    ffn, tensor = ffn_hidden_size(config.model), config.parallel.tensor_model_parallel_size
    if ffn % tensor:
        yield Problem(
            ("--ffn-hidden-size", "--tensor-model-parallel-size"),
            f"an MLP of width {ffn} cannot be cut over {tensor} tensor ranks",
            f"{ffn} % {tensor} = {ffn % tensor}",
            f"use --ffn-hidden-size {multiples_near(ffn, tensor)}, or --tensor-model-parallel-size "
            f"{divisors_near(ffn, tensor)}",
        )


@rule("model.max_position_embeddings", "data.seq_length")
def positions_reach_sequence_length(config: Config, world_size: int) -> Iterator[Problem]:
    """Every token has a position that the model knows."""
    positions, length = config.model.max_position_embeddings, config.data.seq_length
    if positions is not None and positions < length:
        yield Problem(
            ("--max-position-embeddings", "--seq-length"),
            f"sequences of {length} tokens do not fit a model of {positions} positions",
            f"{positions} < {length}",
            f"use --max-position-embeddings {length} or more, or --seq-length {positions} or less",
        )


@rule(
    "model.hidden_size",
    "model.num_attention_heads",
    "model.kv_channels",
    "model.position_embedding_type",
    "model.rotary_percent",
)
def rotary_width_is_even(config: Config, world_size: int) -> Iterator[Problem]:
    """Rotary positions turn pairs of channels, at least one."""
    model, width = config.model, _head_width(config.model)
    if model.position_embedding_type != "rope" or width is None:
        return
    turned = rotary_width(model)
    if turned % 2 == 0 and turned > 0:
        return
    if width % 2:
        way_out = f"--kv-channels {multiples_near(width, 2)}"
    else:
        # Rounded up, since the product is cut off to a whole number.
        way_out = f"--rotary-percent {math.ceil(1e4 * (turned + 2 - turned % 2) / width) / 1e4:g}"
    yield Problem(
        ("--position-embedding-type", "--kv-channels", "--rotary-percent"),
        f"rotary positions turn pairs of channels, but they would turn {turned} of a head's {width}",
        f"int({width} x {model.rotary_percent:g}) = {turned}",
        f"use {way_out}, or --position-embedding-type learned_absolute",
    )


@rule(
    "model.position_embedding_type",
    "model.rotary_percent",
    "model.rotary_seq_len_interpolation_factor",
)
def rotary_settings_act(config: Config, world_size: int) -> Iterator[Problem]:
    """Settings of rotary positions in a model that has none would change nothing, in silence."""
    model = config.model
    asked = {
        "--rotary-percent": model.rotary_percent != 1.0,
        "--rotary-interleaved": model.rotary_interleaved,
        "--rotary-seq-len-interpolation-factor": model.rotary_seq_len_interpolation_factor is not None,
        "--use-rope-scaling": model.use_rope_scaling,
    }
    flags = tuple(flag for flag, given in asked.items() if given)
    if flags and model.position_embedding_type != "rope":
        yield Problem(
            (*flags, "--position-embedding-type"),
            f"settings of rotary positions in a model with {model.position_embedding_type} positions",
            "",
            "add --position-embedding-type rope, or leave out the others",
        )


@rule(
    "model.rope_scaling_low_freq_factor",
    "model.rope_scaling_high_freq_factor",
)
def rope_scaling_fades(config: Config, world_size: int) -> Iterator[Problem]:
    """Between the frequencies that are scaled and those that are not there is a band in which the scaling fades."""
    low, high = config.model.rope_scaling_low_freq_factor, config.model.rope_scaling_high_freq_factor
    if config.model.use_rope_scaling and low >= high:
        yield Problem(
            ("--rope-scaling-low-freq-factor", "--rope-scaling-high-freq-factor"),
            f"frequencies of fewer than {low:g} turns are scaled and those of more than {high:g} are not, with no "
            "band between them",
            f"{low:g} >= {high:g}",
            f"use --rope-scaling-high-freq-factor {4 * low:g}, or --rope-scaling-low-freq-factor {high / 4:g}",
        )


@rule()
def window_is_two_numbers(config: Config, world_size: int) -> Iterator[Problem]:
    """The window of attention is one that a decoder can have."""
    try:
        attention_window(config.model)
    except ValueError as error:
        yield Problem(
            ("--window-size",), str(error), "", "use, for a token and the 1023 before it, --window-size 1023,0"
        )


@rule()
def one_kind_of_residual(config: Config, world_size: int) -> Iterator[Problem]:
    """A parallel residual has one sum a layer, so that no norm can stand between two."""
    if config.model.parallel_residual and config.model.apply_residual_connection_post_layernorm:
        yield Problem(
            ("--parallel-residual", "--apply-residual-connection-post-layernorm"),
            "in a layer where attention and MLP read the same input, no normalised sum of one is the other's input",
            "",
            "leave out --parallel-residual, or leave out --apply-residual-connection-post-layernorm",
        )


@rule("model.hidden_size", "model.position_embedding_type")
def sinusoidal_width_is_even(config: Config, world_size: int) -> Iterator[Problem]:
    """Sinusoidal positions are pairs of a sine and a cosine."""
    hidden = config.model.hidden_size
    if config.model.position_embedding_type == "sinusoidal" and hidden % 2:
        yield Problem(
            ("--position-embedding-type", "--hidden-size"),
            f"sinusoidal positions are pairs of a sine and a cosine, but the hidden size is {hidden}",
            f"{hidden} % 2 = 1",
            f"use --hidden-size {multiples_near(hidden, 2)}, or --position-embedding-type learned_absolute",
        )


def _head_width(model: ModelConfig) -> int | None:
    """Width of a head, or None where hidden / heads is not whole, which a rule of its own reports."""
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        return None
    return kv_channels(model)
