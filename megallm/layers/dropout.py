"""Dropout whose masks depend on the element, not on the layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megallm.layers.context import LayoutContext, SequenceContext
from megallm.random import keep_mask, stream_key


class _ApplyMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (input * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None, None


def apply_dropout(
    input: torch.Tensor, key: torch.Tensor, step: torch.Tensor, rows: torch.Tensor, probability: float
) -> torch.Tensor:
    """Drops elements of `input` [..., columns] with `probability` and scales the rest.

    `rows` int64 [...] numbers the rows of `input` globally: the same row under the same key and step is masked alike
    in any layout.
    """
    keep = keep_mask(key, step, rows, 0, input.shape[-1], probability)
    return _ApplyMask.apply(input, keep, 1.0 / (1.0 - probability))


class HiddenDropout(nn.Module):
    """Dropout of hidden states [local sequence, batch, hidden]."""

    key: torch.Tensor

    def __init__(self, name: str, probability: float, context: LayoutContext) -> None:
        super().__init__()
        self.probability = probability
        self.register_buffer("key", stream_key(context.seed, f"dropout/{name}", context.device), persistent=False)

    def forward(self, hidden: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
        if self.probability == 0.0 or sequence.step is None:
            return hidden
        return apply_dropout(hidden, self.key, sequence.step, sequence.token_rows(), self.probability)
