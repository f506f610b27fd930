"""GPT-NeoX and Pythia: attention and MLP side by side, rotary positions on a part of each head, heads one by one."""

from __future__ import annotations

from megallm.convert.families.settings import Activation, PlainHeads, Rotary
from megallm.convert.family import Family, HeadByHead

_LAYER = "decoder.layers.{}"

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    modules={
        "gpt_neox.embed_in": "embedding.word",
        "gpt_neox.layers.{}.input_layernorm": f"{_LAYER}.attention_norm",
        "gpt_neox.layers.{}.attention.query_key_value": HeadByHead(
            f"{_LAYER}.attention.query", f"{_LAYER}.attention.key", f"{_LAYER}.attention.value"
        ),
        "gpt_neox.layers.{}.attention.dense": f"{_LAYER}.attention.output",
        "gpt_neox.layers.{}.post_attention_layernorm": f"{_LAYER}.mlp_norm",
        "gpt_neox.layers.{}.mlp.dense_h_to_4h": f"{_LAYER}.mlp.up",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h": f"{_LAYER}.mlp.down",
        "gpt_neox.final_layer_norm": "decoder.final_norm",
        "embed_out": "output",
    },
    settings={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "norm_epsilon": "layer_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "parallel_residual": "use_parallel_residual",
    },
    always={"position_embedding_type": "rope", "normalization": "LayerNorm", "add_bias_linear": True},
    defaults={
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
    },
    only={"attention_bias": (True, "an attention without biases")},
    special=(
        PlainHeads("num_attention_heads"),
        Activation(
            ("hidden_act",), {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}
        ),
        Rotary("rotary_emb_base", "rotary_pct", 0.25),
    ),
    prefix="gpt_neox.",
    head="embed_out",
    surplus=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
