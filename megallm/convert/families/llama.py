"""Llama and those that took its shape: RMSNorm, rotary positions, a gated MLP, grouped queries."""

from __future__ import annotations

from megallm.convert.families.settings import Activation, GroupedHeads, Rotary
from megallm.convert.family import Family

_MODULES = {
    "model.embed_tokens": "embedding.word",
    "model.layers.{}.input_layernorm": "decoder.layers.{}.attention_norm",
    "model.layers.{}.self_attn.q_proj": "decoder.layers.{}.attention.query",
    "model.layers.{}.self_attn.k_proj": "decoder.layers.{}.attention.key",
    "model.layers.{}.self_attn.v_proj": "decoder.layers.{}.attention.value",
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
_SPECIAL = (GroupedHeads(), Activation("hidden_act", {"silu": "swiglu"}), Rotary())
_SURPLUS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    modules=_MODULES,
    settings=_SETTINGS,
    always=_ALWAYS,
    defaults=_DEFAULTS | {"max_position_embeddings": 2048},
    only={
        "attention_bias": (False, "biases of all four projections of the attention, without any in the MLP"),
        "mlp_bias": (False, "biases in the MLP alone"),
    },
    special=_SPECIAL,
    prefix="model.",
    surplus=_SURPLUS,
)
