"""Collects gradients in their buckets and starts each bucket's reduction as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megallm.config.operators import OperatorChoices
from megallm.data_parallel.buckets import Bucket, build_buckets, own_parameters
from megallm.layers.context import WeightGradients
from megallm.mesh import Mesh
from megallm.ops.accumulate import accumulate, accumulate_weight_gradient
from megallm.ops.embedding import accumulate_rows


class GradientReducer:
    """Gradients of this rank's model chunks, from the backward passes of a step to their sum over the data parallel
    ranks.

    A parameter is complete when it got its gradient from the last micro-batch. With `overlap`, buckets are reduced
    while later backward passes still run; they start in one fixed order, the same on all ranks. `close_chunk` counts
    what was unused in this step as complete too.
    """

    def __init__(
        self,
        chunks: dict[int, nn.Module],
        mesh: Mesh,
        weight_gradients: WeightGradients,
        *,
        bucket_elements: int,
        sharded: bool,
        overlap: bool,
        decoupled: bool = False,
        operators: OperatorChoices,
    ) -> None:
        # Buckets start in this order. Tied ones wait for another pipeline rank at the end of the step and must not
        # hold up the others.
        buckets = build_buckets(chunks, mesh, bucket_elements, sharded, decoupled)
        self.buckets = sorted(buckets, key=lambda bucket: bucket.key.tie is not None)
        self.overlap = overlap
        self._accumulate = operators.of("accumulate")
        self._accumulate_rows = operators.of("embedding_gradient")
        self._home: dict[nn.Parameter, tuple[Bucket, torch.Tensor]] = {}
        self._remaining: dict[nn.Parameter, int] = {}
        self._incomplete: dict[Bucket, set[nn.Parameter]] = {}
        self._next = 0
        self._num_micro_batches = 0
        for bucket in self.buckets:
            for member in bucket.members:
                self._home[member.parameter] = (bucket, bucket.gradient_of(member))
                # What comes through autograd is not rounded on its way into the bucket, where an operator sums wide.
                member.parameter.grad_dtype = bucket.gradient.dtype
                member.parameter.register_post_accumulate_grad_hook(self._take_gradient)
        weight_gradients.sink = self._take_product
        weight_gradients.row_sink = self._take_rows
        for chunk in chunks.values():
            _wait_for_weights_before_use(chunk, self._home)

    def start_step(self, num_micro_batches: int) -> None:
        """Zeroes the gradients. Every parameter then expects a gradient from each micro-batch."""
        self._num_micro_batches = num_micro_batches
        self._next = 0
        for bucket in self.buckets:
            bucket.gradient.zero_()
            self._incomplete[bucket] = {member.parameter for member in bucket.members}
        self._remaining = dict.fromkeys(self._home, num_micro_batches)

    def close_chunk(self, chunk: int) -> None:
        """Called after the last backward pass of a chunk: what got no gradient by now keeps zeros."""
        for bucket in self.buckets:
            if bucket.key.chunk == chunk and bucket.key.tie is None:
                self._incomplete[bucket].clear()
        self._start_complete_buckets()

    def finish_step(self) -> None:
        """Returns when every bucket is reduced."""
        for bucket in self.buckets:
            self._incomplete[bucket].clear()
        self._start_buckets()
        for bucket in self.buckets:
            bucket.finish_reduction()

    def finish_gather(self) -> None:
        """Returns when all weights are those after the last step."""
        for bucket in self.buckets:
            bucket.finish_gather()

    def _take_gradient(self, parameter: torch.Tensor) -> None:
        """Moves what autograd computed into the bucket.

        The hook runs once in a backward pass, when all uses of the parameter have given their part, even if the sink
        took them all.
        """
        assert isinstance(parameter, nn.Parameter), "hooks are registered on parameters"
        bucket, gradient = self._home[parameter]
        if parameter.grad is not None:
            accumulate(gradient, parameter.grad, implementation=self._accumulate)
            parameter.grad = None
        self._remaining[parameter] -= 1
        if self._remaining[parameter] == 0 and bucket.key.tie is None:
            self._incomplete[bucket].discard(parameter)
            self._start_complete_buckets()

    def _take_product(self, weight: nn.Parameter, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        """Adds the product of a linear layer's two factors to the bucket."""
        _, gradient = self._home[weight]
        accumulate_weight_gradient(gradient, grad_output, input, self._accumulate)

    def _take_rows(self, table: nn.Parameter, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds the gradients of a table's rows to the bucket."""
        accumulate_rows(self._home[table][1], gradient, rows, self._accumulate_rows)

    def _start_complete_buckets(self) -> None:
        if self.overlap:
            self._start_buckets()

    def _start_buckets(self) -> None:
        while self._next < len(self.buckets) and not self._incomplete[self.buckets[self._next]]:
            self.buckets[self._next].start_reduction()
            self._next += 1


def _wait_for_weights_before_use(chunk: nn.Module, home: dict[nn.Parameter, tuple[Bucket, torch.Tensor]]) -> None:
    """A module's weights may still be on their way from other ranks when its forward pass comes."""
    for module in chunk.modules():
        buckets = list(dict.fromkeys(home[p][0] for p in own_parameters(module) if p in home))
        if buckets:
            module.register_forward_pre_hook(_waiter([bucket.finish_gather for bucket in buckets]))


def _waiter(waits: list[Callable[[], None]]) -> Callable[[nn.Module, tuple[object, ...]], None]:
    def wait(module: nn.Module, inputs: tuple[object, ...]) -> None:
        for finish in waits:
            finish()

    return wait
