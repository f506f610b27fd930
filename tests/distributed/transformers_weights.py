"""Small models of the transformers library, and their weights under the names that the engine's parameters describe.

transformers is imported where it is used: of the workers only the one that builds a model pays for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from megallm.parameter import description_of, piece_views
from megallm.train.engine import Engine

VOCAB_SIZE = 51
SEQUENCE_LENGTH = 16
MAX_POSITIONS = 20
HIDDEN_SIZE = 32
NUM_LAYERS = 3
NUM_HEADS = 4
NUM_GROUPS = 2
HEAD_DIM = 8
FFN_HIDDEN_SIZE = 48
ROTARY_BASE = 500.0
NORM_EPSILON = 1e-6

MODELS = ("llama", "llama tied", "gpt2")


class _RotaryInDoubleWidth(nn.Module):
    """Cosines and sines in the dtype of the hidden states; those of transformers have the precision of float32."""

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids int64 [batch, sequence] -> two [batch, sequence, head_dim]."""
        frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, HEAD_DIM, 2, dtype=hidden.dtype) / HEAD_DIM)
        angles = position_ids.unsqueeze(-1).to(hidden.dtype) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def build_model(name: str, dtype: torch.dtype) -> nn.Module:
    """A model of transformers in evaluation mode with random values in every parameter, norms and biases too.

    In float64 the parts of Llama that go through float32 (rotary angles and norms) are replaced by ones that do not.
    """
    model = (_gpt2() if name == "gpt2" else _llama(tied=name == "llama tied")).to(dtype).eval()
    if name != "gpt2" and dtype == torch.float64:
        model.model.rotary_emb = _RotaryInDoubleWidth()
        model.model.norm = nn.RMSNorm(HIDDEN_SIZE, NORM_EPSILON, dtype=dtype)
        for layer in model.model.layers:
            layer.input_layernorm = nn.RMSNorm(HIDDEN_SIZE, NORM_EPSILON, dtype=dtype)
            layer.post_attention_layernorm = nn.RMSNorm(HIDDEN_SIZE, NORM_EPSILON, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_scale = parameter.dim() == 1 and parameter_name.endswith("weight")
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.15 * values + (1.0 if is_scale else 0.0))
    return model


def _llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=FFN_HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_GROUPS,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_POSITIONS,
        n_embd=HIDDEN_SIZE,
        n_layer=NUM_LAYERS,
        n_head=NUM_HEADS,
        n_inner=FFN_HIDDEN_SIZE,
        activation_function="gelu_new",
        layer_norm_epsilon=NORM_EPSILON,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


def model_settings(name: str) -> dict[str, Any]:
    """Our configuration of the same model."""
    common = {
        "model.num_layers": NUM_LAYERS,
        "model.hidden_size": HIDDEN_SIZE,
        "model.ffn_hidden_size": FFN_HIDDEN_SIZE,
        "model.num_attention_heads": NUM_HEADS,
        "model.max_position_embeddings": MAX_POSITIONS,
        "model.norm_epsilon": NORM_EPSILON,
        "model.vocab_size": VOCAB_SIZE,
        "data.seq_length": SEQUENCE_LENGTH,
        "data.mock_data": True,
    }
    if name == "gpt2":
        return common | {"model.position_embedding_type": "learned_absolute", "model.activation": "gelu_tanh"}
    return common | {
        "model.position_embedding_type": "rope",
        "model.rotary_base": ROTARY_BASE,
        "model.normalization": "RMSNorm",
        "model.activation": "swiglu",
        "model.add_bias_linear": False,
        "model.tie_embeddings": name == "llama tied",
        "model.group_query_attention": True,
        "model.num_query_groups": NUM_GROUPS,
    }


def logical_tensors(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors by transformers' parameter names (weights, or gradients) as copies by our global names."""
    renamed = _from_gpt2(tensors) if name == "gpt2" else _from_llama(tensors)
    return {key: tensor.detach().numpy().copy() for key, tensor in renamed.items()}


def _from_llama(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    renamed = {
        "embedding.word.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_norm.weight": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        renamed["output.weight"] = tensors["lm_head.weight"]
    for layer in range(NUM_LAYERS):
        for theirs, ours in parts.items():
            renamed[f"decoder.layers.{layer}.{ours}.weight"] = tensors[f"model.layers.{layer}.{theirs}.weight"]
    return renamed


def _from_gpt2(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        "embedding.word.weight": tensors["transformer.wte.weight"],
        "embedding.position.weight": tensors["transformer.wpe.weight"],
        "decoder.final_norm.weight": tensors["transformer.ln_f.weight"],
        "decoder.final_norm.bias": tensors["transformer.ln_f.bias"],
    }
    linear = {"attn.c_proj": "attention.output", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    for layer in range(NUM_LAYERS):
        ours, theirs = f"decoder.layers.{layer}", f"transformer.h.{layer}"
        for suffix in ("weight", "bias"):
            renamed[f"{ours}.attention_norm.{suffix}"] = tensors[f"{theirs}.ln_1.{suffix}"]
            renamed[f"{ours}.mlp_norm.{suffix}"] = tensors[f"{theirs}.ln_2.{suffix}"]
            # Their linear layers keep weights as [in, out]; a vector is its own transpose.
            qkv = (
                tensors[f"{theirs}.attn.c_attn.{suffix}"].T
                if suffix == "weight"
                else tensors[f"{theirs}.attn.c_attn.bias"]
            )
            for which, part in zip(("query", "key", "value"), qkv.chunk(3), strict=True):
                renamed[f"{ours}.attention.{which}.{suffix}"] = part
            for their_name, our_name in linear.items():
                tensor = tensors[f"{theirs}.{their_name}.{suffix}"]
                renamed[f"{ours}.{our_name}.{suffix}"] = tensor.T if suffix == "weight" else tensor
    return renamed


@torch.no_grad()
def load_weights(engine: Engine, weights: dict[str, np.ndarray]) -> None:
    """Copies this rank's boxes of the logical tensors into the engine. Their shapes must be the described ones."""
    for chunk in engine.chunks.values():
        for parameter in dict.fromkeys(chunk.parameters()):
            for piece, view in piece_views(parameter, description_of(parameter)):
                weight = weights[piece.name]
                assert weight.shape == piece.global_shape, (
                    f"{piece.name}: {weight.shape}, described {piece.global_shape}"
                )
                box = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.shape, strict=True))
                view.copy_(torch.from_numpy(weight[box]))
