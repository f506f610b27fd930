"""Communication over the tensor parallel group inside a model: each function is the adjoint of its backward.

Hidden states are [sequence, batch, hidden], so that cutting the sequence cuts contiguous memory.
"""

from __future__ import annotations

from typing import Any

import torch

from megallm.communication import Group


def gather_first_dim(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[n, ...] of each rank -> [size x n, ...]. No gradient."""
    output = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    group.all_gather(output, tensor.contiguous())
    return output


def reduce_scatter_first_dim(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[size x n, ...] -> the sum's [n, ...] of this rank. No gradient."""
    output = tensor.new_empty((tensor.shape[0] // group.size, *tensor.shape[1:]))
    group.reduce_scatter(output, tensor.contiguous())
    return output


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        result = tensor.contiguous().clone()
        group.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _ScatterSumSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return reduce_scatter_first_dim(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_first_dim(grad, ctx.group), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        parts = gather_first_dim(tensor.unsqueeze(0), group)  # [size, ..., width]
        return torch.cat(list(parts.unbind(0)), dim=-1)  # [..., size x width]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        parts = torch.stack(grad.chunk(ctx.group.size, dim=-1))  # [size, ..., width]
        return reduce_scatter_first_dim(parts, ctx.group).squeeze(0), None


def sum_over_group(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the group; the gradient passes unchanged. Goes after computations that each rank does in part."""
    return tensor if group.size == 1 else _SumOverGroup.apply(tensor, group)


def scatter_sum_sequence(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Sums over the group and keeps this rank's part: [sequence, ...] -> [sequence / size, ...]."""
    return tensor if group.size == 1 else _ScatterSumSequence.apply(tensor, group)


def gather_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., width] of each rank -> [..., size x width]; the gradient is summed and cut again."""
    return tensor if group.size == 1 else _GatherFeatures.apply(tensor, group)
