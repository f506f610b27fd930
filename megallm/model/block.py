"""One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

from __future__ import annotations

import math

import torch
from torch import nn

from megallm.config.tree import ModelConfig
from megallm.layers.attention import SelfAttention
from megallm.layers.context import LayoutContext, SequenceContext
from megallm.layers.dropout import HiddenDropout
from megallm.layers.mlp import MLP
from megallm.layers.norm import Norm


class TransformerLayer(nn.Module):
    """Pre-norm layer: [sequence (/ tp), batch, hidden] -> the same shape."""

    def __init__(self, name: str, config: ModelConfig, context: LayoutContext, recompute_core_attention: bool) -> None:
        super().__init__()
        assert config.kv_channels and config.num_query_groups and config.ffn_hidden_size, (
            "the configuration is resolved"
        )
        hidden, epsilon = config.hidden_size, config.norm_epsilon
        deviation = config.init_method_std
        # Each layer adds two outputs to the residual stream: their variance is kept down to that of one (GPT-2).
        output_deviation = deviation / math.sqrt(2.0 * config.num_layers)
        self.attention_norm = Norm(f"{name}.attention_norm", config.normalization, hidden, epsilon, context)
        self.attention = SelfAttention(
            f"{name}.attention",
            hidden,
            config.num_attention_heads,
            config.num_query_groups,
            config.kv_channels,
            context,
            bias=config.add_bias_linear,
            qkv_bias=config.add_qkv_bias,
            standard_deviation=deviation,
            output_standard_deviation=output_deviation,
            dropout=config.attention_dropout,
            recompute_core=recompute_core_attention,
        )
        self.attention_dropout = HiddenDropout(f"{name}.attention_output", config.hidden_dropout, context)
        self.mlp_norm = Norm(f"{name}.mlp_norm", config.normalization, hidden, epsilon, context)
        self.mlp = MLP(
            f"{name}.mlp",
            hidden,
            config.ffn_hidden_size,
            config.activation,
            context,
            bias=config.add_bias_linear,
            standard_deviation=deviation,
            output_standard_deviation=output_deviation,
        )
        self.mlp_dropout = HiddenDropout(f"{name}.mlp_output", config.hidden_dropout, context)

    def forward(self, hidden: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
        attended = self.attention(self.attention_norm(hidden), sequence)
        hidden = hidden + self.attention_dropout(attended, sequence)
        return hidden + self.mlp_dropout(self.mlp(self.mlp_norm(hidden)), sequence)
