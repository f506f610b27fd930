"""Small models of the transformers library, and their weights under the names that the engine's parameters describe.

transformers is imported where it is used: of the workers only the one that builds a model pays for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.convert.families.gpt2 import GPT2
from megallm.convert.families.gpt_neox import GPT_NEOX
from megallm.convert.families.llama import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from megallm.convert.family import Family
from megallm.convert.model import logical_shapes

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

ROTARY_SHARE = 0.5
WIDE_HEAD_DIM = 12
WINDOW = 5

LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": ROTARY_BASE,
    "factor": 4.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 1.5,
    "original_max_position_embeddings": 12,
}


class _RMSNormInDoubleWidth(nn.Module):
    """RMSNorm without a step through float32; Gemma adds its weight to one."""

    def __init__(self, width: int, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float64))
        self.offset = offset

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        root = (hidden.square().mean(-1, keepdim=True) + NORM_EPSILON).sqrt()
        return hidden / root * (self.weight + self.offset)


class _RotaryInDoubleWidth(nn.Module):
    """Cosines and sines in the dtype of the hidden states; those of transformers have the precision of float32."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        parameters, head_dim = config.rope_parameters, getattr(config, "head_dim", None) or HEAD_DIM
        width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        self.frequencies = [
            _scaled(parameters["rope_theta"] ** (-2 * pair / width), parameters) for pair in range(width // 2)
        ]

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids int64 [batch, sequence] -> two [batch, sequence, rotated channels]."""
        angles = position_ids.unsqueeze(-1).to(hidden.dtype) * hidden.new_tensor(self.frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def _scaled(frequency: float, parameters: Mapping[str, Any]) -> float:
    """One frequency as `rope_type` says, after the description of each type rather than its code."""
    if parameters["rope_type"] == "linear":
        return frequency / parameters["factor"]
    if parameters["rope_type"] == "default":
        return frequency
    assert parameters["rope_type"] == "llama3", f"a frequency of type {parameters['rope_type']}"
    wavelength, original = 2 * math.pi / frequency, parameters["original_max_position_embeddings"]
    low, high, factor = parameters["low_freq_factor"], parameters["high_freq_factor"], parameters["factor"]
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def build_model(name: str, dtype: torch.dtype) -> nn.Module:
    """A model of transformers in evaluation mode with random values in every parameter, norms and biases too.

    In float64 the parts that go through float32 (rotary angles, RMSNorm, the scale of embeddings) are replaced by ones
    that do not.
    """
    model = MODELS[name].build().to(dtype).eval()
    if dtype == torch.float64:
        for module in list(model.modules()):
            for child_name, child in list(module.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    offset = 1.0 if type(child).__name__.startswith("Gemma") else 0.0
                    setattr(module, child_name, _RMSNormInDoubleWidth(child.weight.numel(), offset))
                elif type(child).__name__.endswith("RotaryEmbedding"):
                    setattr(module, child_name, _RotaryInDoubleWidth(child.config))
                elif hasattr(child, "embed_scale"):
                    child.embed_scale.fill_(child.scalar_embed_scale)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_scale = parameter.dim() == 1 and parameter_name.endswith("weight")
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.15 * values + (1.0 if is_scale else 0.0))
    return model


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(_like_llama() | changes)))


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_like_llama(), sliding_window=WINDOW))


def _qwen_2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_like_llama()))


def _qwen_3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_like_llama(), head_dim=WIDE_HEAD_DIM))


def _gemma() -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    changes = {
        "head_dim": WIDE_HEAD_DIM,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        # A padding token would get no gradient.
        "pad_token_id": None,
    }
    return GemmaForCausalLM(GemmaConfig(**(_like_llama() | changes)))


def _gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=FFN_HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        layer_norm_eps=NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE, "partial_rotary_factor": ROTARY_SHARE},
        hidden_act="gelu",
        use_parallel_residual=True,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return GPTNeoXForCausalLM(config)


def _like_llama() -> dict[str, Any]:
    """What the configurations of Llama and its descendants share."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": FFN_HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_GROUPS,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": NORM_EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }


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


SETTINGS: dict[str, Any] = {
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
GPT_2_SETTINGS = SETTINGS | {"model.position_embedding_type": "learned_absolute", "model.activation": "gelu_tanh"}
LLAMA_SETTINGS = SETTINGS | {
    "model.position_embedding_type": "rope",
    "model.rotary_base": ROTARY_BASE,
    "model.normalization": "RMSNorm",
    "model.activation": "swiglu",
    "model.add_bias_linear": False,
    "model.tie_embeddings": False,
    "model.group_query_attention": True,
    "model.num_query_groups": NUM_GROUPS,
}


def logical_tensors(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors by transformers' parameter names (weights, or gradients) as copies by our global names."""
    model = MODELS[name]
    config = resolve(build(model.settings | {"training.micro_batch_size": 1, "training.train_iters": 1}), 1)
    shapes = logical_shapes(config)
    dtype = next(iter(tensors.values())).detach().numpy().dtype
    found = {key: np.zeros(shape, dtype) for key, shape in shapes.items()}
    for stored in model.family.stored(config.model, shapes):
        # In memory the head has one name in all families.
        tensor = tensors[stored.name.replace(model.family.head, "lm_head")].detach()
        rows = (tensor.t() if stored.transposed else tensor).split([part.shape[0] for part in stored.parts])
        for part, values in zip(stored.parts, rows, strict=True):
            found[part.name][part.offset[0] : part.offset[0] + part.shape[0]] = values.numpy()
    return found


@dataclass(frozen=True)
class SmallModel:
    """A model of transformers, our configuration of it, and the table of its names."""

    build: Callable[[], Any]
    settings: dict[str, Any]
    family: Family


MODELS = {
    "llama": SmallModel(_llama, LLAMA_SETTINGS, LLAMA),
    "llama tied": SmallModel(
        lambda: _llama(tie_word_embeddings=True), LLAMA_SETTINGS | {"model.tie_embeddings": True}, LLAMA
    ),
    "gpt2": SmallModel(_gpt2, GPT_2_SETTINGS, GPT2),
    "llama 3": SmallModel(
        lambda: _llama(rope_parameters=LLAMA_3_SCALING),
        LLAMA_SETTINGS
        | {
            "model.use_rope_scaling": True,
            "model.rope_scaling_factor": LLAMA_3_SCALING["factor"],
            "model.rope_scaling_low_freq_factor": LLAMA_3_SCALING["low_freq_factor"],
            "model.rope_scaling_high_freq_factor": LLAMA_3_SCALING["high_freq_factor"],
            "model.rope_scaling_original_length": LLAMA_3_SCALING["original_max_position_embeddings"],
        },
        LLAMA,
    ),
    "llama, interpolated": SmallModel(
        lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": ROTARY_BASE, "factor": 2.0}),
        LLAMA_SETTINGS | {"model.rotary_seq_len_interpolation_factor": 2.0},
        LLAMA,
    ),
    # Their window holds the token itself, ours counts those before it.
    "mistral": SmallModel(_mistral, LLAMA_SETTINGS | {"model.window_size": f"{WINDOW - 1},0"}, MISTRAL),
    "qwen 2": SmallModel(_qwen_2, LLAMA_SETTINGS | {"model.add_qkv_bias": True}, QWEN2),
    "qwen 3": SmallModel(
        _qwen_3, LLAMA_SETTINGS | {"model.qk_layernorm": True, "model.kv_channels": WIDE_HEAD_DIM}, QWEN3
    ),
    "gemma": SmallModel(
        _gemma,
        LLAMA_SETTINGS
        | {
            "model.kv_channels": WIDE_HEAD_DIM,
            "model.apply_layernorm_1p": True,
            "model.activation": "geglu",
            "model.scale_embeddings": True,
            "model.tie_embeddings": True,
        },
        GEMMA,
    ),
    "gpt-neox": SmallModel(
        _gpt_neox,
        SETTINGS
        | {
            "model.position_embedding_type": "rope",
            "model.rotary_base": ROTARY_BASE,
            "model.rotary_percent": ROTARY_SHARE,
            "model.parallel_residual": True,
            "model.tie_embeddings": False,
        },
        GPT_NEOX,
    ),
}
