"""One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megallm.config.tree import ModelConfig
from megallm.layers import recompute
from megallm.layers.attention import SelfAttention
from megallm.layers.context import LayoutContext, SequenceContext
from megallm.layers.dropout import HiddenDropout
from megallm.layers.mlp import MLP
from megallm.layers.norm import Norm, NormSettings
from megallm.model.initial import initial_methods


def norm_settings(config: ModelConfig) -> NormSettings:
    """What the norms of a model have in common."""
    return NormSettings(config.normalization, config.norm_epsilon, config.apply_layernorm_1p)


class TransformerLayer(nn.Module):
    """Pre-norm layer: [sequence (/ tp), batch, hidden] -> the same shape.

    With a parallel residual, attention and MLP both read the layer's input. With the residual taken after the norm,
    attention and MLP are added to their own normalised inputs: then a norm stands between any two sums, as in a
    post-norm layer, only that the layer begins with it instead of ending with it.

    Of `recompute_modules`, "core_attn" and "mlp" are computed again in the backward pass instead of being kept.
    """

    def __init__(
        self, name: str, config: ModelConfig, context: LayoutContext, recompute_modules: Sequence[str]
    ) -> None:
        super().__init__()
        assert config.kv_channels and config.num_query_groups and config.ffn_hidden_size, (
            "the configuration is resolved"
        )
        self.recompute_mlp = "mlp" in recompute_modules
        self.parallel_residual = config.parallel_residual
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        hidden, norm = config.hidden_size, norm_settings(config)
        methods = initial_methods(config)
        self.attention_norm = Norm(f"{name}.attention_norm", norm, hidden, context)
        self.attention = SelfAttention(
            f"{name}.attention",
            hidden,
            config.num_attention_heads,
            config.num_query_groups,
            config.kv_channels,
            context,
            bias=config.add_bias_linear,
            qkv_bias=config.add_qkv_bias,
            initial=methods.inner,
            output_initial=methods.output,
            dropout=config.attention_dropout,
            recompute_core="core_attn" in recompute_modules,
            qk_norm=norm if config.qk_layernorm else None,
        )
        self.attention_dropout = HiddenDropout(f"{name}.attention_output", config.hidden_dropout, context)
        self.mlp_norm = Norm(f"{name}.mlp_norm", norm, hidden, context)
        self.mlp = MLP(
            f"{name}.mlp",
            hidden,
            config.ffn_hidden_size,
            config.activation,
            context,
            bias=config.add_bias_linear,
            initial=methods.inner,
            output_initial=methods.output,
        )
        self.mlp_dropout = HiddenDropout(f"{name}.mlp_output", config.hidden_dropout, context)

    def forward(self, hidden: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
        normalised, hidden = self.attention_norm.of_sum(hidden, None)
        attended, bias = self.attention(normalised, sequence), self.attention.output.bias
        residual = normalised if self.residual_after_norm else hidden
        if self.parallel_residual:
            residual = self.attention_dropout(attended, sequence, bias, residual)
            normalised = self.mlp_norm(hidden)
        elif self.attention_dropout.of(sequence) is not None:
            total = self.attention_dropout(attended, sequence, bias, residual)
            normalised, residual = self.mlp_norm.of_sum(total, None)
        else:
            attended = self.attention_dropout(attended, sequence, bias)
            normalised, residual = self.mlp_norm.of_sum(attended, residual)
        if self.residual_after_norm:
            residual = normalised
        widened = recompute.run(self.mlp, normalised, again=self.recompute_mlp)
        return self.mlp_dropout(widened, sequence, self.mlp.output.bias, residual)
