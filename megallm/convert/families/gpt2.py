"""GPT-2: LayerNorm, learned positions, linear layers that store their matrices as [in, out]."""

from __future__ import annotations

from megallm.convert.families.settings import Activation, InnerWidth, PlainHeads
from megallm.convert.family import Family, Rows

_LAYER = "decoder.layers.{}"

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    modules={
        "transformer.wte": "embedding.word",
        "transformer.wpe": "embedding.position",
        "transformer.h.{}.ln_1": f"{_LAYER}.attention_norm",
        "transformer.h.{}.attn.c_attn": Rows(
            (f"{_LAYER}.attention.query", f"{_LAYER}.attention.key", f"{_LAYER}.attention.value"), transposed=True
        ),
        "transformer.h.{}.attn.c_proj": Rows((f"{_LAYER}.attention.output",), transposed=True),
        "transformer.h.{}.ln_2": f"{_LAYER}.mlp_norm",
        "transformer.h.{}.mlp.c_fc": Rows((f"{_LAYER}.mlp.up",), transposed=True),
        "transformer.h.{}.mlp.c_proj": Rows((f"{_LAYER}.mlp.down",), transposed=True),
        "transformer.ln_f": "decoder.final_norm",
        "lm_head": "output",
    },
    settings={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "max_position_embeddings": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    always={"position_embedding_type": "learned_absolute", "normalization": "LayerNorm", "add_bias_linear": True},
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "activation_function": "gelu_new"},
    only={
        "scale_attn_weights": (True, "attention scores that are not divided by the root of the head's width"),
        "scale_attn_by_inverse_layer_idx": (False, "attention scores divided by the number of the layer"),
        "add_cross_attention": (False, "attention to an encoder"),
    },
    special=(
        Activation(("activation_function",), {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}),
        InnerWidth("n_inner", "n_embd"),
        PlainHeads("n_head", "n_embd"),
    ),
    prefix="transformer.",
    surplus=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
)
