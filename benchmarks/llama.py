"""The model that whole-model benchmarks measure: Llama-2-7B, or a small one of its kind that proves that they run."""

from __future__ import annotations

import re
from typing import Any

import torch

from megallm.config import Config, resolve
from megallm.config.dictionary import build
from megallm.plan.flops import ModelFlops
from megallm.plan.gpus import GPUS, Gpu

SIZES: dict[str, dict[str, Any]] = {
    "7b": {
        "model.num_layers": 32,
        "model.hidden_size": 4096,
        "model.ffn_hidden_size": 11008,
        "model.num_attention_heads": 32,
        "model.vocab_size": 32000,
        "data.seq_length": 4096,
    },
    "small": {
        "model.num_layers": 2,
        "model.hidden_size": 64,
        "model.ffn_hidden_size": 176,
        "model.num_attention_heads": 4,
        "model.vocab_size": 500,
        "data.seq_length": 64,
    },
}
_COMMON: dict[str, Any] = {
    "model.position_embedding_type": "rope",
    "model.normalization": "RMSNorm",
    "model.activation": "swiglu",
    "model.add_bias_linear": False,
    "model.tie_embeddings": False,
    "training.train_iters": 10_000,
    "training.bf16": True,
    "optimizer.lr": 3e-4,
    "optimizer.lr_decay_style": "constant",
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 1.0,
    "data.mock_data": True,
}


def configuration(size: str, micro_batch_size: int, accumulation: int, **training: Any) -> Config:
    """The resolved configuration of one process: `accumulation` micro-batches make a step. bfloat16."""
    values = _COMMON | SIZES[size] | {f"training.{name}": value for name, value in training.items()}
    values |= {
        "training.micro_batch_size": micro_batch_size,
        "training.global_batch_size": micro_batch_size * accumulation,
    }
    return resolve(build(values), 1)


def size_for(device: torch.device) -> str:
    return "7b" if device.type == "cuda" else "small"


def known_gpu(device: torch.device) -> Gpu | None:
    """What is stated of this GPU; None for any other device, whose peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "PCIE" in name.upper() or "NVL" in name:
        return None  # slower than their namesakes
    # "NVIDIA A100-SXM4-80GB", whose words must be all of the name's: a GB200 is no B200.
    words = set(re.split(r"[ -]", name.removesuffix("GB")))
    found = [gpu for gpu in GPUS.values() if words >= set(gpu.name.split("-"))]
    return found[0] if found else None


def rates(flops: ModelFlops, tokens: int, seconds: float, gpu: Gpu | None) -> dict[str, float]:
    """Tokens and operations of a second, and utilisation of the stated peak, in both conventions of attention."""
    found = {
        "tokens_per_second": tokens / seconds,
        "teraflops_half_attention": flops.half * tokens / seconds / 1e12,
        "teraflops_full_attention": flops.full * tokens / seconds / 1e12,
    }
    if gpu is not None:
        found["mfu_half_attention"] = flops.half * tokens / seconds / gpu.flops
        found["mfu_full_attention"] = flops.full * tokens / seconds / gpu.flops
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def describe(figures: dict[str, float]) -> str:
    """The same for people."""
    text = f"{figures['tokens_per_second']:.0f} tokens/s, {figures['teraflops_half_attention']:.4g} TFLOP/s"
    if "mfu_half_attention" in figures:
        text += f", MFU {figures['mfu_half_attention']:.1%} (causal attention counted half), "
        text += f"{figures['mfu_full_attention']:.1%} (counted in full)"
    return text
