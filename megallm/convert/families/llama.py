"""Llama and those that took its shape: RMSNorm, rotary positions, a gated MLP, grouped queries."""

from __future__ import annotations

from dataclasses import replace

from megallm.convert.families.settings import Activation, GroupedHeads, Rotary, SlidingWindow
from megallm.convert.family import Family

_MODULES = {
    "model.embed_tokens": "embedding.word",
    "model.layers.{}.input_layernorm": "decoder.layers.{}.attention_norm",
    "model.layers.{}.self_attn.q_proj": "decoder.layers.{}.attention.query",
    "model.layers.{}.self_attn.k_proj": "decoder.layers.{}.attention.key",
    "model.layers.{}.self_attn.v_proj": "decoder.layers.{}.attention.value",
    "model.layers.{}.self_attn.q_norm": "decoder.layers.{}.attention.query_norm",
    "model.layers.{}.self_attn.k_norm": "decoder.layers.{}.attention.key_norm",
    "model.layers.{}.self_attn.o_proj": "decoder.layers.{}.attention.output",
    "model.layers.{}.post_attention_layernorm": "decoder.layers.{}.mlp_norm",
    "model.layers.{}.mlp.gate_proj": "decoder.layers.{}.mlp.gate",
    "model.layers.{}.mlp.up_proj": "decoder.layers.{}.mlp.up",
    "model.layers.{}.mlp.down_proj": "decoder.layers.{}.mlp.down",
    "model.norm": "decoder.final_norm",
    "lm_head": "output",
}
_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_ALWAYS = {"position_embedding_type": "rope", "normalization": "RMSNorm", "add_bias_linear": False}
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
_SPECIAL = (GroupedHeads(), Activation(("hidden_act",), {"silu": "swiglu"}), Rotary())
_SURPLUS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

_NO_BIAS_OF_ATTENTION = {
    "attention_bias": (False, "biases of all four projections of the attention, without any in the MLP")
}
_NO_WINDOW_IN_SOME_LAYERS = {"use_sliding_window": (False, "a window in some layers only")}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    modules=_MODULES,
    settings=_SETTINGS,
    always=_ALWAYS,
    defaults=_DEFAULTS | {"max_position_embeddings": 2048},
    only=_NO_BIAS_OF_ATTENTION | {"mlp_bias": (False, "biases in the MLP alone")},
    special=_SPECIAL,
    prefix="model.",
    surplus=_SURPLUS,
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults=_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    only={},
    special=(*_SPECIAL, SlidingWindow("sliding_window")),
)

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    always=_ALWAYS | {"add_qkv_bias": True},
    defaults=_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    only=_NO_WINDOW_IN_SOME_LAYERS,
)

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    always=_ALWAYS | {"qk_layernorm": True},
    defaults=_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    only=_NO_BIAS_OF_ATTENTION | _NO_WINDOW_IN_SOME_LAYERS,
)

GEMMA = replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    always=_ALWAYS | {"apply_layernorm_1p": True, "scale_embeddings": True},
    defaults=_DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    only=_NO_BIAS_OF_ATTENTION | {"use_bidirectional_attention": (False, "attention to what comes after")},
    special=(
        GroupedHeads(),
        # The first models say "gelu" and mean this one, as the library knows.
        Activation(("hidden_act", "hidden_activation"), {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"}),
        Rotary(),
    ),
)
