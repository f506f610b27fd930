"""Small Hugging Face folders by hand, so that most tests need no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file as load_file
from safetensors.torch import save_file

VOCAB, HIDDEN, FFN, LAYERS, HEADS, GROUPS, HEAD_DIM, POSITIONS = 11, 8, 12, 2, 4, 2, 2, 16

LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GPT2_CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
}


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers saves them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (HIDDEN,),
            f"{name}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.k_proj.weight": (GROUPS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.v_proj.weight": (GROUPS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{name}.post_attention_layernorm.weight": (HIDDEN,),
            f"{name}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{name}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{name}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    """As the first GPT-2 on the hub has them: without the prefix, and with masks that older versions saved."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCAB, HIDDEN), "wpe.weight": (POSITIONS, HIDDEN)}
    for layer in range(LAYERS):
        for module, in_size, out_size in (
            ("attn.c_attn", HIDDEN, 3 * HIDDEN),
            ("attn.c_proj", HIDDEN, HIDDEN),
            ("mlp.c_fc", HIDDEN, 4 * HIDDEN),
            ("mlp.c_proj", 4 * HIDDEN, HIDDEN),
        ):
            shapes |= {f"h.{layer}.{module}.weight": (in_size, out_size), f"h.{layer}.{module}.bias": (out_size,)}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.weight": (HIDDEN,), f"h.{layer}.{norm}.bias": (HIDDEN,)}
        shapes[f"h.{layer}.attn.bias"] = (1, 1, POSITIONS, POSITIONS)
    return shapes | {"ln_f.weight": (HIDDEN,), "ln_f.bias": (HIDDEN,)}


def make_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random values, another for each name."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A folder with the model in one file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, with whatever files hold them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
