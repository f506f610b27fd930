"""The optimizer step over buckets: global norm, clipping, the update of this rank's ranges, gather of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from megallm.config.operators import OperatorChoices
from megallm.data_parallel.buckets import Bucket
from megallm.data_parallel.reducer import GradientReducer
from megallm.mesh import Mesh
from megallm.ops.sum_of_squares import sum_of_squares
from megallm.optimizer.adamw import AdamWSettings, AdamWState, adamw_step, new_state
from megallm.optimizer.clipping import clip_coefficient, count_zeros
from megallm.optimizer.loss_scale import LossScale
from megallm.optimizer.rates import Rates
from megallm.optimizer.sgd import SGDSettings, SGDState, new_sgd_state, sgd_step


@dataclass
class Shard:
    """This rank's flat range of a bucket: master weights (float32 or float64) and moments."""

    bucket: Bucket
    master: torch.Tensor
    state: AdamWState | SGDState

    @property
    def gradient(self) -> torch.Tensor:
        return self.bucket.gradient[self.bucket.shard]

    @property
    def rounded(self) -> torch.Tensor | None:
        """The model's own weights in this range, where they have fewer bits than the master weights."""
        own = self.bucket.weights[self.bucket.shard]
        return None if own.dtype == self.master.dtype else own


@dataclass
class StepOutcome:
    """Scalars of one step, on the device.

    The norm before clipping, whether the step was skipped (0 or 1), the loss scale of the next step, sums that rode
    along, and the number of zeros in the gradient where they are counted.
    """

    grad_norm: torch.Tensor
    skipped: torch.Tensor
    loss_scale: torch.Tensor
    sums: torch.Tensor
    num_zeros: torch.Tensor | None = None


class BucketOptimizer:
    """AdamW, or gradient descent with momentum, over the buckets of a reducer.

    Where weights are float32 or float64 they are their own master copy; for 16-bit ones a float32 copy is kept for this
    rank's ranges. Gradients come multiplied by the `loss_scale`, which moves on with each step.
    """

    def __init__(
        self,
        reducer: GradientReducer,
        mesh: Mesh,
        settings: AdamWSettings | SGDSettings,
        *,
        max_grad_norm: float,
        overlap_gather: bool,
        loss_scale: LossScale,
        operators: OperatorChoices,
        counts_zeros: bool = False,
    ) -> None:
        self.reducer = reducer
        self.mesh = mesh
        self.settings = settings
        self.max_grad_norm = max_grad_norm
        self.overlap_gather = overlap_gather
        self.loss_scale = loss_scale
        self.counts_zeros = counts_zeros
        self.operators = operators
        self.shards: list[Shard] = []
        for bucket in reducer.buckets:
            own = bucket.weights[bucket.shard]
            master = own if own.dtype == bucket.gradient.dtype else own.to(bucket.gradient.dtype)
            self.shards.append(Shard(bucket, master, self._new_state(master)))

    def step(self, rates: Rates, sums: torch.Tensor) -> StepOutcome:
        """Updates the weights from the reduced gradients.

        `sums`, float64 [n], is summed over all ranks in the message that carries the norm. A norm that is not finite
        skips the step on every rank alike, and is what the loss scale goes down by. Waits for nothing on a GPU.
        """
        squares = self._squares([shard.gradient for shard in self.shards if self._counts(shard.bucket)])
        # A copy that does not count must be finite all the same: zero times anything else is not a number.
        copies = self._squares([shard.gradient for shard in self.shards if not shard.bucket.key.counts])
        totals = torch.cat(((squares + 0.0 * copies).reshape(1), sums, self._zeros()))
        self.mesh.world.all_reduce(totals)
        scale = self.loss_scale.value
        norm = totals[0].sqrt() / scale
        skipped = (~torch.isfinite(norm)).double()
        # One factor takes the loss scale out of the gradients and clips them.
        coefficient = clip_coefficient(norm, self.max_grad_norm) / scale
        for shard in self.shards:
            self._update(shard, rates, coefficient, skipped)
            shard.bucket.start_gather()
        self.loss_scale.update(skipped)
        if not self.overlap_gather:
            self.reducer.finish_gather()
        num_zeros = totals[-1] if self.counts_zeros else None
        return StepOutcome(norm, skipped, self.loss_scale.value.clone(), totals[1 : 1 + len(sums)], num_zeros)

    def weights_norm(self) -> torch.Tensor:
        """The norm of all trained weights: float64 scalar, the same on every rank. Waits for nothing on a GPU."""
        counted = [shard.master for shard in self.shards if self._counts(shard.bucket)]
        total = self._squares(counted)
        self.mesh.world.all_reduce(total)
        return total.sqrt()

    def publish_weights(self) -> None:
        """Copies master weights into the model's and starts collecting the other ranks' ranges."""
        for shard in self.shards:
            if shard.rounded is not None:
                shard.rounded.copy_(shard.master)
            shard.bucket.start_gather()

    def _squares(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return sum_of_squares(gradients, self.mesh.device, self.operators.of("sum_of_squares"))

    def _new_state(self, master: torch.Tensor) -> AdamWState | SGDState:
        return new_state(master) if isinstance(self.settings, AdamWSettings) else new_sgd_state(master)

    def _update(self, shard: Shard, rates: Rates, coefficient: torch.Tensor, skipped: torch.Tensor) -> None:
        """Moves master weights, and the model's own with them."""
        key, settings = shard.bucket.key, self.settings
        adamw = partial(adamw_step, implementation=self.operators.of("adamw"))
        update = partial(
            adamw if isinstance(settings, AdamWSettings) else sgd_step,
            learning_rate=rates.vocabulary_learning_rate if key.decoupled else rates.learning_rate,
            weight_decay=rates.weight_decay if key.decays else 0.0,
            clip_coefficient=coefficient,
            skip=skipped,
            rounded=shard.rounded,
        )
        update(shard.master, shard.gradient, shard.state, settings)

    def _zeros(self) -> torch.Tensor:
        """This rank's part of the zeros in the gradient: float64 [1], or [0] where nobody counts them."""
        if not self.counts_zeros:
            return torch.zeros(0, dtype=torch.float64, device=self.mesh.device)
        counted = [shard for shard in self.shards if self._counts(shard.bucket)]
        zeros = count_zeros([shard.gradient for shard in counted], self.mesh.device)
        return (zeros - sum(shard.bucket.num_paddings for shard in counted)).reshape(1)

    def _counts(self, bucket: Bucket) -> bool:
        """Whether this rank's gradient enters the norm: every logical element does so on exactly one rank."""
        return bucket.key.counts and (bucket.sharded or bucket.group.rank == 0)
