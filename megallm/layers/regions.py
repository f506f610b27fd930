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


class _FirstPosition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.is_here, ctx.shape = group.rank == 0, tensor.shape
        first = tensor[0].clone()
        group.broadcast(first, 0)
        return first

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = grad.new_zeros(ctx.shape)
        if ctx.is_here:
            whole[0] = grad
        return whole, None


def first_position(tensor: torch.Tensor, group: Group, is_cut: bool) -> torch.Tensor:
    """What stands first in a sequence that may be cut over the group: [sequence (/ size), ...] -> [...] on every rank.

    All ranks are to compute the same with it: the gradient is taken from each for its own part of the sequence.
    """
    return _FirstPosition.apply(tensor, group) if is_cut else tensor[0]


class _GradientOfFirstRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.group.broadcast(grad, 0)
        return grad, None


def gradient_of_first_rank(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """`tensor`, which all ranks have alike and use alike; its gradient is the first rank's, to the last bit."""
    return tensor if group.size == 1 else _GradientOfFirstRank.apply(tensor, group)


class _ValueOfFirstRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        value = tensor.clone(memory_format=torch.contiguous_format)
        group.broadcast(value, 0)
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def value_of_first_rank(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """`tensor`, which all ranks have alike but for rounding, as the first one has it; the gradient is each rank's own.

    What a rank then computes with it for a parameter that all ranks hold is the same to the last bit.
    """
    return tensor if group.size == 1 else _ValueOfFirstRank.apply(tensor, group)


def sum_over_group(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the group; the gradient passes unchanged. Goes after computations that each rank does in part."""
    return tensor if group.size == 1 else _SumOverGroup.apply(tensor, group)


def scatter_sum_sequence(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Sums over the group and keeps this rank's part: [sequence, ...] -> [sequence / size, ...]."""
    return tensor if group.size == 1 else _ScatterSumSequence.apply(tensor, group)


def gather_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., width] of each rank -> [..., size x width]; the gradient is summed and cut again."""
    return tensor if group.size == 1 else _GatherFeatures.apply(tensor, group)
