"""The scale of the loss and of every gradient, defined here and nowhere else.

A loss is a sum of terms t, each with a weight w_t, a sum S_t over something countable (tokens, sentences, examples)
and its count N_t:

    loss = sum over t of  w_t * S_t / N_t

S_t and N_t run over the whole global batch: all micro-batches of all data parallel ranks. N_t is known before the
first backward pass, since it depends on the data alone. Each micro-batch on each rank therefore differentiates

    scale * sum over t of  w_t * (its share of S_t) / N_t

and gradients are plain sums over micro-batches and ranks. `scale` is the loss scale of float16 and 1 in every other
precision; the optimizer divides the sums by it, in float32, before it does anything else with them. A batch in which
nothing counts has loss 0.

Label smoothing and z-loss are part of S_t where it is differentiated. What is told of a term, in training and in an
evaluation, is S_t / N_t without them, so that it can be compared with any other run's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megallm.communication import Group


@dataclass(frozen=True)
class LossTerm:
    """One term on one micro-batch: its name, weight, and sum (scalar tensor).

    `objective` is what training lowers where that is not the sum itself. A term of weight 0 is only told.
    """

    name: str
    weight: float
    sum: torch.Tensor
    objective: torch.Tensor | None = None

    @property
    def differentiated(self) -> torch.Tensor:
        """Scalar tensor with gradient."""
        return self.sum if self.objective is None else self.objective


class LossScaler:
    """Scales the terms of each micro-batch and keeps their sums for the report.

    Args:
        local_counts: float64 [terms], this rank's share of N_t.
        group: the data parallel ranks. The sum is started here and waited for where it is needed, so that a gather
            of weights that is still under way in the same group holds up nobody.
        scale: scalar on the device.

    `sums` is float64 [terms], this rank's S_t so far, without the scale.
    """

    def __init__(self, local_counts: torch.Tensor, group: Group, scale: torch.Tensor) -> None:
        self._scale = scale
        self._counts = local_counts
        self._summing = group.all_reduce(self._counts, asynchronous=True)
        self.sums = torch.zeros_like(local_counts)

    @property
    def counts(self) -> torch.Tensor:
        """N_t over the whole batch: float64 [terms]."""
        self._summing.wait()
        return self._counts

    def __call__(self, terms: list[LossTerm]) -> torch.Tensor:
        """The scalar to differentiate, in the terms' dtype: float32 or wider. `terms` come in the order of the
        counts.
        """
        counts = self.counts.clamp(min=1.0)
        total = terms[0].sum.new_zeros(())
        for number, term in enumerate(terms):
            self.sums[number] += term.sum.detach()
            if term.weight:
                total = total + term.differentiated * (term.weight / counts[number]).to(total.dtype)
        return total * self._scale.to(total.dtype)
