"""Attention: one function for the core, one module around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megallm.layers import recompute
from megallm.layers.context import LayoutContext, SequenceContext
from megallm.layers.linear import ColumnParallelLinear, RowParallelLinear
from megallm.layers.norm import Norm, NormSettings
from megallm.layers.regions import gather_features
from megallm.ops import Dropout, scaled_masked_softmax
from megallm.parameter import InitialMethod
from megallm.random import stream_key


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    dropout: Dropout | None,
    implementation: str = "auto",
) -> torch.Tensor:
    """The core of attention.

    query [batch, heads, sequence, head_dim]; key and value [batch, groups, sequence, head_dim], heads a multiple of
    groups. Causal where `allowed` (bool, True = may look, [batch, 1, sequence, sequence]) is None; else keys and values
    may be of more tokens than queries. Dropout, with rows [batch, heads, sequence], takes the way through the scores,
    whose softmax is computed by `implementation`. Returns [batch, heads, sequence, head_dim].
    """
    scale = query.shape[-1] ** -0.5
    repeats = query.shape[1] // key.shape[1]
    if dropout is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=repeats > 1
        )
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Scaled inside the product, before it is rounded: unscaled scores of wide heads overflow in float16.
    # [batch, heads, sequence, head_dim] -> [batch x heads, sequence, head_dim]
    scores = torch.baddbmm(
        query.new_empty(()), query.flatten(0, 1), key.flatten(0, 1).transpose(-2, -1), beta=0, alpha=scale
    )
    scores = scores.unflatten(0, query.shape[:2])  # [batch, heads, sequence, sequence]
    masked = None if allowed is None else ~allowed
    weights = scaled_masked_softmax(
        scores, masked, 1.0, causal=allowed is None, dropout=dropout, implementation=implementation
    )
    return weights.matmul(value)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    implementation: str,
    *dropout: Any,
) -> torch.Tensor:
    """`attend` with the parts of `dropout`, if any, one by one: so what is computed again keeps them as tensors."""
    return attend(query, key, value, allowed, Dropout(*dropout) if dropout else None, implementation)


class SelfAttention(nn.Module):
    """Multi-head, grouped or multi-query self-attention: [sequence (/ tp), batch, hidden] -> the same shape.

    The bias of the output is left to what follows, which adds it together with dropout and residual.

    Each tensor rank computes its share of the query heads. Where the query groups do not divide among the ranks, each
    rank projects an equal part of the key and value features, the parts are gathered, and every rank picks the groups
    of its heads. With `qk_norm`, queries and keys are normalised over the channels of each head, before they are
    rotated.
    """

    stream: torch.Tensor

    def __init__(
        self,
        name: str,
        hidden_size: int,
        num_heads: int,
        num_groups: int,
        head_dim: int,
        context: LayoutContext,
        *,
        bias: bool,
        qkv_bias: bool,
        initial: InitialMethod,
        output_initial: InitialMethod,
        dropout: float,
        recompute_core: bool,
        qk_norm: NormSettings | None = None,
    ) -> None:
        super().__init__()
        tp = context.tp
        self.tp = tp
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.local_heads = num_heads // tp.size
        self.num_groups = num_groups
        self.groups_divide = num_groups % tp.size == 0
        self.dropout = dropout
        self.rotary = context.operators.of("rotary")
        self.softmax = context.operators.of("softmax")
        self.recompute_core = recompute_core
        self.input = ColumnParallelLinear(
            {
                f"{name}.query": num_heads * head_dim,
                f"{name}.key": num_groups * head_dim,
                f"{name}.value": num_groups * head_dim,
            },
            hidden_size,
            context,
            bias=bias or qkv_bias,
            initial=initial,
        )
        self.output = RowParallelLinear(
            f"{name}.output",
            num_heads * head_dim,
            hidden_size,
            context,
            bias=bias,
            initial=output_initial,
        )
        self.query_norm = self.key_norm = None
        if qk_norm is not None:
            # One weight for all heads, of which each tensor rank sees its own.
            self.query_norm = Norm(f"{name}.query_norm", qk_norm, head_dim, context, gradient_partial_over=("tp",))
            self.key_norm = Norm(f"{name}.key_norm", qk_norm, head_dim, context, gradient_partial_over=("tp",))
        self.register_buffer("stream", stream_key(context.seed, f"dropout/{name}", context.device), persistent=False)

    def forward(self, hidden: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
        query, key, value = self._heads(self.input(hidden), sequence)
        # [s, b, heads, head_dim] -> [b, heads, s, head_dim]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if sequence.cache is not None:
            key, value = sequence.cache.extend(self, key, value)
        dropout = self._dropout(sequence) or ()
        attended = recompute.run(
            _attend, query, key, value, sequence.allowed, self.softmax, *dropout, again=self.recompute_core
        )
        # [b, heads, s, head_dim] -> [s, b, heads x head_dim]
        return self.output.product(attended.permute(2, 0, 1, 3).flatten(2))

    def _heads(
        self, packed: torch.Tensor, sequence: SequenceContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [sequence, batch, heads, head_dim] out of what was projected together."""
        rotation = sequence.rotation
        if rotation is not None and self.query_norm is None and self.groups_divide:
            groups = self.num_groups // self.tp.size
            return rotation.split(packed, (self.local_heads, groups, groups), self.rotary)
        query, key, value = packed.split(self.input.local_sizes, dim=-1)
        query = query.unflatten(-1, (self.local_heads, self.head_dim))  # [s, b, heads, head_dim]
        key, value = self._groups(key), self._groups(value)  # [s, b, groups, head_dim]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotation.apply(query, key, self.rotary)
        return query, key, value

    def _groups(self, features: torch.Tensor) -> torch.Tensor:
        if self.groups_divide:
            return features.unflatten(-1, (self.num_groups // self.tp.size, self.head_dim))
        groups = gather_features(features, self.tp).unflatten(-1, (self.num_groups, self.head_dim))
        heads = torch.arange(self.local_heads, device=features.device) + self.tp.rank * self.local_heads
        return groups.index_select(2, heads // (self.num_heads // self.num_groups))

    def _dropout(self, sequence: SequenceContext) -> Dropout | None:
        if self.dropout == 0.0 or sequence.step is None:
            return None
        first = self.tp.rank * self.local_heads
        rows = sequence.score_rows(self.num_heads, range(first, first + self.local_heads))
        return Dropout(self.dropout, self.stream, sequence.step, rows)
