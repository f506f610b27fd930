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


def added(hidden: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
    """The sum of what a layer returns, where no norm makes it."""
    return hidden if branch is None else hidden + branch


class TransformerLayer(nn.Module):
    """Pre-norm layer: [sequence (/ tp), batch, hidden] -> the same shape.

    Hidden states come and go as two summands, of which the second (the `branch` that the MLP was) may be None: the norm
    that the next layer begins with adds them on its way.

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

    def forward(
        self, hidden: torch.Tensor, branch: torch.Tensor | None, sequence: SequenceContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normalised, hidden = self.attention_norm.of_sum(hidden, branch)
        attended, bias = self.attention(normalised, sequence), self.attention.output.bias
        if self.parallel_residual:
            normalised, hidden = self.mlp_norm.of_sum(hidden, None)
            residual = added(*self.attention_dropout.onto(hidden, attended, bias, sequence))
        else:
            residual = normalised if self.residual_after_norm else hidden
            normalised, total = self.mlp_norm.of_sum(*self.attention_dropout.onto(residual, attended, bias, sequence))
            residual = normalised if self.residual_after_norm else total
        widened = recompute.run(self.mlp, normalised, again=self.recompute_mlp)
        return self.mlp_dropout.onto(residual, widened, self.mlp.output.bias, sequence)
