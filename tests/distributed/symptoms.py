"""What exactly is wrong with a run: the parity comparison says that something is, this says where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.distributed.parity import GRADIENT_BOUND, GRADIENT_FLOOR, LOSS_BOUND, Outcome, assemble, compare


@dataclass(frozen=True)
class Symptoms:
    """Names of the logical tensors that are wrong on at least one rank that holds them, and where the scalars go wrong.

    Attributes:
        initial_weights: not equal bit for bit.
        gradients: of the first step, out of the bound.
        grad_norm: whether the norm of the first step is out of the bound.
        first_loss: the first step whose loss is out of the bound on some rank, or None.
    """

    initial_weights: frozenset[str]
    gradients: frozenset[str]
    grad_norm: bool
    first_loss: int | None


def diagnose(reference: list[Outcome], outcomes: list[Outcome]) -> Symptoms:
    """Compares every box of every rank with the same box of one process."""
    gradients = assemble(reference, "gradients")
    everything = np.sqrt(sum(float((tensor**2).sum()) for tensor in gradients.values()))
    bounds = {
        name: GRADIENT_BOUND * max(float(np.linalg.norm(tensor)), GRADIENT_FLOOR * everything)
        for name, tensor in gradients.items()
    }
    exact = dict.fromkeys(gradients, 0.0)
    losses = np.array([outcome.losses for outcome in outcomes])
    wanted = np.array(reference[0].losses)
    wrong_losses = ~(np.abs(losses - wanted) <= LOSS_BOUND * np.abs(wanted)).all(axis=0)
    norm = reference[0].grad_norms[0]
    return Symptoms(
        initial_weights=_wrong_names(reference, outcomes, "initial_weights", exact),
        gradients=_wrong_names(reference, outcomes, "gradients", bounds),
        grad_norm=not all(abs(outcome.grad_norms[0] - norm) <= GRADIENT_BOUND * norm for outcome in outcomes),
        first_loss=int(np.argmax(wrong_losses)) if wrong_losses.any() else None,
    )


def _wrong_names(
    reference: list[Outcome], outcomes: list[Outcome], what: str, bounds: dict[str, float]
) -> frozenset[str]:
    wanted = assemble(reference, what)
    wrong = set()
    for outcome in outcomes:
        squares = dict.fromkeys(wanted, 0.0)
        for name, _, offset, values, _ in getattr(outcome, what):
            place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
            with np.errstate(over="ignore", invalid="ignore"):
                squares[name] += float(((values - wanted[name][place]) ** 2).sum())
        # Written so that what is not a number is wrong.
        wrong |= {name for name, square in squares.items() if not np.sqrt(square) <= bounds[name]}
    return frozenset(wrong)


def objection(reference: list[Outcome], outcomes: list[Outcome]) -> str:
    """What the parity comparison objects to; empty if it passes."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            difference = compare(reference, outcomes)
    except AssertionError as error:
        return str(error)
    return "" if difference.passes else repr(difference)
