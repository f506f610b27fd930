"""BERT: norms at the end of each layer, learned positions, types of tokens, and three choices of heads.

A norm that ends a layer of theirs is the first one of our next layer, that of the embedding the first one of layer 0,
and the last one is our final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megallm.config.resolve import num_token_types
from megallm.config.tree import ModelConfig
from megallm.convert.families.settings import Activation, PlainHeads
from megallm.convert.family import Family, OfNext, Rule, Special

_OURS, _THEIRS = "encoder.layers.{}", "bert.encoder.layer.{}"
_ENCODER: dict[str, Rule] = {
    "bert.embeddings.word_embeddings": "embedding.word",
    "bert.embeddings.position_embeddings": "embedding.position",
    "bert.embeddings.token_type_embeddings": "embedding.type",
    "bert.embeddings.LayerNorm": "encoder.layers.0.attention_norm",
    f"{_THEIRS}.attention.self.query": f"{_OURS}.attention.query",
    f"{_THEIRS}.attention.self.key": f"{_OURS}.attention.key",
    f"{_THEIRS}.attention.self.value": f"{_OURS}.attention.value",
    f"{_THEIRS}.attention.output.dense": f"{_OURS}.attention.output",
    f"{_THEIRS}.attention.output.LayerNorm": f"{_OURS}.mlp_norm",
    f"{_THEIRS}.intermediate.dense": f"{_OURS}.mlp.up",
    f"{_THEIRS}.output.dense": f"{_OURS}.mlp.down",
    f"{_THEIRS}.output.LayerNorm": OfNext(f"{_OURS}.attention_norm", "encoder.final_norm"),
}
_WORDS: dict[str, Rule] = {
    "cls.predictions.transform.dense": "head.transform",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.predictions": "output",
}
_ORDER: dict[str, Rule] = {"bert.pooler.dense": "pooler", "cls.seq_relationship": "next_sentence"}
_ALWAYS = {
    "architecture": "bert",
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "apply_residual_connection_post_layernorm": True,
    "tie_embeddings": True,
}


@dataclass(frozen=True)
class TokenTypes(Special):
    """The table of token types, which every model of theirs has."""

    ours = ("num_token_types",)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_token_types": theirs["type_vocab_size"]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        types = num_token_types(model)
        if not types:
            raise ValueError("num_token_types 0 (it has 1 at least, which --num-token-types 1 trains)")
        return {"type_vocab_size": types}


BERT_PRETRAINING = Family(
    model_type="bert",
    architecture="BertForPreTraining",
    modules=_ENCODER | _WORDS | _ORDER,
    settings={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "norm_epsilon": "layer_norm_eps",
    },
    always=_ALWAYS | {"bert_binary_head": True},
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "max_position_embeddings": 512},
    only={
        "position_embedding_type": ("absolute", "positions that are looked up for each pair of tokens"),
        "is_decoder": (False, "attention to what came before only"),
        "add_cross_attention": (False, "attention to an encoder"),
        "tie_word_embeddings": (True, "an output layer that is not the embedding"),
    },
    special=(Activation(("hidden_act",), {"gelu": "gelu"}), PlainHeads("num_attention_heads"), TokenTypes()),
    prefix="bert.",
    head="cls.predictions.decoder",
    surplus=r"bert\.embeddings\.position_ids",
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    older={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    loader="AutoModelForPreTraining",
    logits="prediction_logits",
)
BERT_MASKED_LM = replace(
    BERT_PRETRAINING,
    architecture="BertForMaskedLM",
    modules=_ENCODER | _WORDS,
    always=_ALWAYS | {"bert_binary_head": False},
    left_behind=r"bert\.pooler\..*|cls\.seq_relationship\..*",
    loader="AutoModelForMaskedLM",
    logits="logits",
)
BERT_MODEL = replace(
    BERT_PRETRAINING,
    architecture="BertModel",
    may_lack=r"(head|output|pooler|next_sentence)\..*",
    left_behind=r"cls\..*",
)
