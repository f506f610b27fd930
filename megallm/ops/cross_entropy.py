"""Cross-entropy over a vocabulary that may be cut over several ranks, its gradient written over the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from megallm.ops.library import NATIVE, register_fakes

__all__ = [
    "CrossEntropy",
    "Reduce",
    "TokenLosses",
    "cross_entropy",
    "local_statistics",
    "logit_gradients_",
    "loss_statistics",
    "statistics_over_ranks",
    "token_losses",
]

# (tensor, "sum" or "max") -> None: reduces the tensor in place over the ranks that share the vocabulary.
Reduce = Callable[[Tensor, str], None]


def alone(tensor: Tensor, reduction: str) -> None:
    """One rank has the whole vocabulary."""


@dataclass(frozen=True)
class CrossEntropy:
    """What the loss of a token is.

    Attributes:
        vocab_size: words over all ranks; columns beyond them are padding and get no probability.
        first: the vocabulary's number of this rank's first column.
        label_smoothing: the share of the target's probability that is spread over all words, as in torch.
        z_loss: coefficient of the squared logarithm of the softmax's denominator, which keeps logits from drifting
            (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
        ignore_index: a target whose token has no loss.
        reduce: over the ranks that share the vocabulary.
    """

    vocab_size: int
    first: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    reduce: Reduce = alone

    @property
    def is_regularised(self) -> bool:
        return self.label_smoothing != 0.0 or self.z_loss != 0.0


def cross_entropy(logits: Tensor, targets: Tensor, loss: CrossEntropy, implementation: str = "auto") -> Tensor:
    """Loss of each token in nats: [...] for `logits` [..., columns] and int64 `targets` [...]; float32 or float64.

        loss = (1 - smoothing) (L - x[target]) + smoothing (L - mean of x) + z_loss L^2,  L = log of the sum of exp(x)

    The backward pass writes the gradient over the logits, which nothing else may need by then; it works once. Nothing
    waits for the host. Statistics are summed in float32 (float64 for float64), in an order that the row alone decides.
    """
    return token_losses(logits, targets, loss, implementation).objective


class TokenLosses(NamedTuple):
    """Of each token [...], 0 where its target is ignored; float32 or float64. Only the objective has a gradient."""

    objective: Tensor  # with label smoothing and z-loss, as `cross_entropy` has it
    # Only where one of them is on; otherwise the objective is the plain loss.
    plain: Tensor | None = None  # L - x[target]
    squares: Tensor | None = None  # L^2

    def tensors(self) -> tuple[Tensor, ...]:
        """As many as there are."""
        return tuple(each for each in self if each is not None)


def token_losses(logits: Tensor, targets: Tensor, loss: CrossEntropy, implementation: str = "auto") -> TokenLosses:
    """What `cross_entropy` returns, and what it is made of."""
    return TokenLosses(*_CrossEntropy.apply(logits, targets, loss, implementation))


@dataclass(frozen=True)
class Statistics:
    """Of each token, over all ranks: [tokens], float32 or float64."""

    largest: Tensor
    exponentials: Tensor  # sum of exp(x - largest)
    losses: TokenLosses


def loss_statistics(logits: Tensor, targets: Tensor, loss: CrossEntropy, implementation: str = "auto") -> Statistics:
    """What the loss and its gradient need: one pass that reads the logits, then two small reductions."""
    return statistics_over_ranks(*local_statistics(logits, targets, loss, implementation), targets, loss)


def local_statistics(
    logits: Tensor, targets: Tensor, loss: CrossEntropy, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Of each token over this rank's columns: the largest logit, and the sums that the loss is made of.

    [tokens], and [3, tokens] for the exponentials above the largest, the target's logit (0 where another rank has it)
    and all logits; float32 or float64.
    """
    if NATIVE.serves("cross_entropy", logits, implementation):
        return torch.ops.megallm.cross_entropy_statistics(logits, targets, loss.first, loss.vocab_size)
    return _statistics_reference(logits, targets, loss.first, loss.vocab_size)


def statistics_over_ranks(largest: Tensor, sums: Tensor, targets: Tensor, loss: CrossEntropy) -> Statistics:
    """What all ranks' `local_statistics` of the same tokens make together, in two reductions; overwrites them."""
    own = largest.clone()
    loss.reduce(largest, "max")
    # A rank may hold nothing but padding: -inf, of which nothing is left beside any other.
    sums[0].mul_(torch.where(own == largest, 0.0, own - largest).exp_())
    loss.reduce(sums, "sum")
    exponentials, predicted, total = sums.unbind(0)
    logarithm = exponentials.log()
    # Taken from the largest, where the numbers are small, lest large logits cost digits.
    plain = objective = logarithm + (largest - predicted)
    losses = [plain]
    if loss.is_regularised:
        squares = (logarithm + largest).square()
        if loss.label_smoothing:
            mean = total / loss.vocab_size
            objective = plain * (1.0 - loss.label_smoothing) + (logarithm + (largest - mean)) * loss.label_smoothing
        if loss.z_loss:
            objective = objective + squares * loss.z_loss
        losses = [objective, plain, squares]
    ignored = targets.reshape(-1) == loss.ignore_index
    for each in losses:
        each.masked_fill_(ignored, 0.0)
    # By itself: the other two sums are not kept for the backward pass.
    return Statistics(largest, exponentials.clone(), TokenLosses(*losses))


def logit_gradients_(
    logits: Tensor,
    targets: Tensor,
    statistics: tuple[Tensor, Tensor],
    grad_losses: Tensor,
    loss: CrossEntropy,
    implementation: str = "auto",
) -> None:
    """Overwrites the logits with their gradient.

    `statistics` are the largest logit and the sum of exponentials of each token, `grad_losses` [...] float32 or
    float64.
    """
    gradient = _gradient_reference
    if NATIVE.serves("cross_entropy", logits, implementation):
        gradient = torch.ops.megallm.cross_entropy_backward_
    gradient(
        logits,
        targets,
        *statistics,
        grad_losses,
        loss.first,
        loss.vocab_size,
        loss.label_smoothing,
        loss.z_loss,
        loss.ignore_index,
    )
    increment_version(logits)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, loss: CrossEntropy, implementation: str
    ) -> tuple[Tensor, ...]:
        logits = logits.contiguous()  # as the product that made it left it
        statistics = loss_statistics(logits, targets, loss, implementation)
        ctx.save_for_backward(logits, targets, statistics.largest, statistics.exponentials)
        ctx.loss, ctx.implementation = loss, implementation
        objective, *told = (each.view(targets.shape) for each in statistics.losses.tensors())
        ctx.mark_non_differentiable(*told)
        ctx.set_materialize_grads(False)
        return objective, *told

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, *of_what_is_told: None) -> tuple[Tensor, None, None, None]:
        logits, targets, *statistics = ctx.saved_tensors
        # Without its history: the product that made the logits does not need them in its backward pass.
        logits = logits.detach()
        logit_gradients_(logits, targets, tuple(statistics), grad_losses, ctx.loss, ctx.implementation)
        return logits, None, None, None


def _columns(targets: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """The column of each target, 0 where another rank has it, and where that is."""
    local = targets.reshape(-1) - first
    absent = (local < 0) | (local >= words)
    return local.masked_fill(absent, 0), absent


def _words(width: int, first: int, vocab_size: int) -> int:
    """Columns that are words and not padding."""
    return min(max(vocab_size - first, 0), width)


def _statistics_reference(logits: Tensor, targets: Tensor, first: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Largest [tokens], and sums [3, tokens] of exponentials, of the target's logit and of all logits."""
    words = _words(logits.shape[-1], first, vocab_size)
    wide = logits.flatten(0, -2)[:, :words]  # [tokens, words]
    wide = wide if logits.dtype == torch.float64 else wide.float()
    if words == 0:
        nothing = wide.new_zeros(wide.shape[0])
        return nothing - torch.inf, torch.stack((nothing, nothing, nothing))
    largest = wide.amax(dim=-1)
    local, absent = _columns(targets, first, words)
    predicted = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(absent, 0.0)
    return largest, torch.stack(((wide - largest.unsqueeze(-1)).exp().sum(dim=-1), predicted, wide.sum(dim=-1)))


def _gradient_reference(
    logits: Tensor,
    targets: Tensor,
    largest: Tensor,
    exponentials: Tensor,
    grad_losses: Tensor,
    first: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
) -> None:
    words = _words(logits.shape[-1], first, vocab_size)
    rows = logits.flatten(0, -2)  # [tokens, columns]
    rows[:, words:] = 0.0
    if words == 0:
        return
    grad = grad_losses.reshape(-1)
    factor = grad * (1.0 + 2.0 * z_loss * (exponentials.log() + largest)) / exponentials
    wide = rows[:, :words].to(grad.dtype) - largest.unsqueeze(-1)
    gradient = wide.exp_().mul_(factor.unsqueeze(-1)).sub_((grad * (label_smoothing / vocab_size)).unsqueeze(-1))
    local, absent = _columns(targets, first, words)
    at_target = (-grad * (1.0 - label_smoothing)).masked_fill(absent, 0.0)
    gradient.scatter_add_(-1, local.unsqueeze(-1), at_target.unsqueeze(-1))
    rows[:, :words] = gradient.masked_fill_((targets.reshape(-1) == ignore_index).unsqueeze(-1), 0.0)


def _fake_statistics(logits: Tensor, targets: Tensor, first: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    tokens, wide = targets.numel(), torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(tokens, dtype=wide), logits.new_empty((3, tokens), dtype=wide)


def _fake_backward(*arguments: object) -> None:
    return None


register_fakes({"cross_entropy_statistics": _fake_statistics, "cross_entropy_backward_": _fake_backward})
