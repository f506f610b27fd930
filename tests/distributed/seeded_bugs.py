"""Classic silent bugs of parallel training, each put into the engine on purpose.

A bug is a function of a `pytest.MonkeyPatch`, called in every worker before the engine is built. It may patch modules
and classes, which is undone after the job, and may return a function that changes the engine once it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

import megallm.data_parallel.buckets
import megallm.data_parallel.optimizer
import megallm.data_parallel.reducer
import megallm.layers.attention
import megallm.layers.linear
import megallm.layers.norm
import megallm.model.embedding
import megallm.parameter
import megallm.train.step
import megallm.train.tasks.words
from megallm.communication import Channel, Group, Transport, Work
from megallm.data_parallel.buckets import Bucket
from megallm.data_parallel.optimizer import BucketOptimizer
from megallm.data_parallel.reducer import GradientReducer
from megallm.layers import recompute
from megallm.layers.attention import SelfAttention
from megallm.layers.context import SequenceContext
from megallm.layers.dropout import HiddenDropout
from megallm.layers.linear import ColumnParallelLinear, ReplicatedLinear, _Linear
from megallm.layers.norm import Norm
from megallm.layers.regions import _GatherFeatures, gather_features
from megallm.mesh import Mesh
from megallm.model.gpt import GPTStage
from megallm.ops.sum_of_squares import sum_of_squares
from megallm.optimizer.adamw import adamw_step
from megallm.optimizer.clipping import clip_coefficient
from megallm.parameter import Description, description_of
from megallm.pipeline.executor import PipelineExecutor
from megallm.random import normal_box, stream_key
from megallm.schedule import Action, Kind, LoweredSchedule
from megallm.train.engine import Engine
from megallm.train.loss import LossScaler, LossTerm
from tests.distributed.parity import Case, Outcome, run_case

Prepare = Callable[[Engine], None]
Bug = Callable[[pytest.MonkeyPatch], Prepare | None]


def run_changed(rank: int, case: Case, changes: tuple[Bug, ...]) -> Outcome:
    """Trains a case with changes made to the engine, the first one first. The worker is sound again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        prepares = [change(patch) for change in changes]

        def prepare(engine: Engine) -> None:
            for one in prepares:
                if one is not None:
                    one(engine)

        return run_case(rank, case, prepare)


# What parameters say of themselves


def _describe(patch: pytest.MonkeyPatch, module: Any, **changes: Any) -> None:
    patch.setattr(
        module, "Description", lambda *positional, **named: replace(Description(*positional, **named), **changes)
    )


def norm_gradient_not_summed_over_tensor_ranks(patch: pytest.MonkeyPatch) -> None:
    _describe(patch, megallm.layers.norm, gradient_partial_over=())


def norm_of_heads_summed_as_other_norms(patch: pytest.MonkeyPatch) -> None:
    """Its rows are cut by heads, whether or not the sequence is cut."""
    patch.setattr(
        megallm.layers.attention,
        "Norm",
        lambda name, settings, width, context, gradient_partial_over: Norm(name, settings, width, context),
    )


def row_parallel_bias_gradient_not_summed_over_tensor_ranks(patch: pytest.MonkeyPatch) -> None:
    _describe(patch, megallm.layers.linear, gradient_partial_over=())


def position_gradient_not_summed_over_tensor_ranks(patch: pytest.MonkeyPatch) -> None:
    _describe(patch, megallm.model.embedding, gradient_partial_over=())


def norms_decay(patch: pytest.MonkeyPatch) -> None:
    _describe(patch, megallm.layers.norm, decays=True)


def same_initial_values_on_every_tensor_rank(patch: pytest.MonkeyPatch) -> None:
    def box_at_zero(
        seed: int,
        name: str,
        global_shape: tuple[int, ...],
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        device: torch.device,
        implementation: str,
    ) -> torch.Tensor:
        return normal_box(seed, name, global_shape, (0,) * len(offset), shape)

    patch.setattr(megallm.parameter, "normal_box", box_at_zero)


# Norm, clipping, update


def tied_weight_counted_twice_in_the_norm(patch: pytest.MonkeyPatch) -> None:
    counts = BucketOptimizer._counts
    patch.setattr(BucketOptimizer, "_counts", lambda self, bucket: counts(self, bucket) or bucket.key.tie is not None)


def replicated_parameter_counted_on_every_tensor_rank_in_the_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BucketOptimizer, "_counts", lambda self, bucket: bucket.sharded or bucket.group.rank == 0)


def clip_coefficient_from_the_local_norm(patch: pytest.MonkeyPatch) -> None:
    local_norms: list[torch.Tensor] = []

    def remember(*arguments: Any) -> torch.Tensor:
        squares = sum_of_squares(*arguments)
        local_norms.append(squares.sqrt())
        return squares

    patch.setattr(megallm.data_parallel.optimizer, "sum_of_squares", remember)
    patch.setattr(
        megallm.data_parallel.optimizer,
        "clip_coefficient",
        lambda norm, limit: clip_coefficient(local_norms[-1], limit),
    )


def skip_decided_by_each_shard_alone(patch: pytest.MonkeyPatch) -> None:
    def step(weights: torch.Tensor, gradient: torch.Tensor, *others: Any, skip: torch.Tensor, **named: Any) -> None:
        own = (~torch.isfinite(gradient).all()).double()
        adamw_step(weights, gradient, *others, skip=own, **named)

    patch.setattr(megallm.data_parallel.optimizer, "adamw_step", step)


# Scale of the loss


def mean_of_the_means_of_ranks(patch: pytest.MonkeyPatch) -> None:
    alone = Group((0,), 0, Transport(None))
    patch.setattr(
        megallm.train.step, "LossScaler", lambda local, group, scale: LossScaler(local * group.size, alone, scale)
    )


def mean_of_the_means_of_micro_batches(patch: pytest.MonkeyPatch) -> Prepare:
    def number_of_micro_batches(engine: Engine, micro_batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.tensor([float(len(micro_batches))], dtype=torch.float64)

    patch.setattr(megallm.train.step, "_local_counts", number_of_micro_batches)

    def prepare(engine: Engine) -> None:
        loss_terms = engine.task.loss_terms

        def means(outputs: Any, batch: dict[str, torch.Tensor], context: Any) -> list[LossTerm]:
            counted = batch["loss_mask"].sum().clamp(min=1.0)
            return [
                replace(term, sum=term.sum / counted, objective=term.differentiated / counted)
                for term in loss_terms(outputs, batch, context)
            ]

        patch.setattr(engine.task, "loss_terms", means)

    return prepare


def gradient_divided_by_the_number_of_micro_batches_once_more(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        loss_terms = engine.task.loss_terms

        def divided(*arguments: Any) -> list[LossTerm]:
            return [replace(term, weight=term.weight / engine.num_micro_batches) for term in loss_terms(*arguments)]

        patch.setattr(engine.task, "loss_terms", divided)

    return prepare


def counts_summed_over_the_world(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        patch.setattr(
            megallm.train.step, "LossScaler", lambda local, group, scale: LossScaler(local, engine.mesh.world, scale)
        )

    return prepare


# The loss scale


def loss_scale_not_taken_out_on_the_last_rank(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        if engine.mesh.rank != engine.mesh.shape.world_size - 1:
            return

        def step(weights: torch.Tensor, gradient: torch.Tensor, *others: Any, **named: Any) -> None:
            gradient *= engine.optimizer.loss_scale.value
            adamw_step(weights, gradient, *others, **named)

        patch.setattr(megallm.data_parallel.optimizer, "adamw_step", step)

    return prepare


def clipped_by_the_norm_of_scaled_gradients(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        patch.setattr(
            megallm.data_parallel.optimizer,
            "clip_coefficient",
            lambda norm, limit: clip_coefficient(norm * engine.optimizer.loss_scale.value, limit),
        )

    return prepare


def loss_scale_moved_by_each_rank_alone(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        step, scale = engine.optimizer.step, engine.optimizer.loss_scale
        update = scale.update

        def step_with_own_scale(*arguments: Any) -> Any:
            finite = [torch.isfinite(shard.gradient).all() for shard in engine.optimizer.shards]
            own = (~torch.stack(finite).all()).double()
            patch.setattr(scale, "update", lambda skipped: update(own))
            return step(*arguments)

        patch.setattr(engine.optimizer, "step", step_with_own_scale)

    return prepare


# Dropout and positions


def _describe_sequences(
    patch: pytest.MonkeyPatch, change: Callable[[GPTStage, SequenceContext], SequenceContext]
) -> None:
    describe = GPTStage.describe_sequence
    patch.setattr(GPTStage, "describe_sequence", lambda self, batch, step: change(self, describe(self, batch, step)))


def equal_masks_on_data_ranks(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        first = engine.mesh.dp.rank * engine.config.training.micro_batch_size
        _describe_sequences(patch, lambda stage, sequence: replace(sequence, sample_ids=sequence.sample_ids - first))

    return prepare


def equal_masks_on_sequence_parts(patch: pytest.MonkeyPatch) -> None:
    def token_rows(self: SequenceContext) -> torch.Tensor:
        local = torch.arange(len(self.local_positions))
        return self.sample_ids.unsqueeze(0) * self.sequence_length + local.unsqueeze(1)

    patch.setattr(SequenceContext, "token_rows", property(token_rows))


def equal_masks_on_the_heads_of_tensor_ranks(patch: pytest.MonkeyPatch) -> None:
    dropout = SelfAttention._dropout

    def as_on_the_first_rank(self: SelfAttention, sequence: SequenceContext) -> Any:
        arguments = dropout(self, sequence)
        assert arguments is not None, "the case has attention dropout"
        rows = arguments.rows - self.tp.rank * self.local_heads * sequence.sequence_length
        return arguments._replace(rows=rows)

    patch.setattr(SelfAttention, "_dropout", as_on_the_first_rank)


def hidden_dropout_depends_on_the_tensor_rank(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        for stage in engine.chunks.values():
            for module in stage.modules():
                if isinstance(module, HiddenDropout):
                    module.key = stream_key(engine.mesh.tp.rank, "dropout")

    return prepare


def recompute_takes_another_dropout_step(patch: pytest.MonkeyPatch) -> None:
    run = recompute.run

    def with_another_step_again(function: Callable[..., Any], *arguments: Any, again: bool) -> Any:
        calls = count()

        def called(*given: Any) -> Any:
            if next(calls) > 0:
                given = tuple(
                    replace(value, step=value.step + 1) if isinstance(value, SequenceContext) else value
                    for value in given
                )
            return function(*given)

        return run(called, *arguments, again=again)

    patch.setattr(recompute, "run", with_another_step_again)


def positions_start_at_zero_on_every_sequence_part(patch: pytest.MonkeyPatch) -> None:
    _describe_sequences(
        patch,
        lambda stage, sequence: replace(sequence, local_positions=torch.arange(len(sequence.local_positions))),
    )


# Tensor parallel layers


class _Muted:
    """A group that leaves out one reduction."""

    def __init__(self, group: Group, reduction: str) -> None:
        self.group, self.reduction = group, reduction

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def all_reduce(self, tensor: torch.Tensor, reduction: str = "sum", asynchronous: bool = False) -> Work:
        return Work() if reduction == self.reduction else self.group.all_reduce(tensor, reduction, asynchronous)


def _lose_reduction_in_cross_entropy(patch: pytest.MonkeyPatch, reduction: str) -> None:
    cross_entropy = megallm.train.tasks.words.vocabulary_cross_entropy
    patch.setattr(
        megallm.train.tasks.words,
        "vocabulary_cross_entropy",
        lambda logits, targets, loss, group, *others: cross_entropy(
            logits,
            targets,
            loss,
            _Muted(group, reduction),  # type: ignore[arg-type]
            *others,
        ),
    )


def cross_entropy_without_the_largest_over_ranks(patch: pytest.MonkeyPatch) -> None:
    _lose_reduction_in_cross_entropy(patch, "max")


def cross_entropy_without_the_sum_over_ranks(patch: pytest.MonkeyPatch) -> None:
    _lose_reduction_in_cross_entropy(patch, "sum")


def padded_vocabulary_enters_the_norm(patch: pytest.MonkeyPatch) -> None:
    finish_step = GradientReducer.finish_step

    def finish_with_padding(self: GradientReducer) -> None:
        finish_step(self)
        for bucket in self.buckets:
            for member in bucket.members:
                piece = description_of(member.parameter).pieces[0]
                bucket.gradient_of(member)[piece.shape[0] : piece.rows] = 0.01

    patch.setattr(GradientReducer, "finish_step", finish_with_padding)


def padded_vocabulary_gets_probability(patch: pytest.MonkeyPatch) -> None:
    cross_entropy = megallm.train.tasks.words.vocabulary_cross_entropy
    patch.setattr(
        megallm.train.tasks.words,
        "vocabulary_cross_entropy",
        lambda logits, targets, loss, group, *others: cross_entropy(
            logits, targets, replace(loss, vocab_size=logits.shape[-1] * group.size), group, *others
        ),
    )


def whole_layer_counted_on_every_tensor_rank(patch: pytest.MonkeyPatch) -> None:
    def forward(self: ReplicatedLinear, input: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(input, self.weight, self.context.weight_gradients, None, False) + self.bias

    patch.setattr(ReplicatedLinear, "forward", forward)


def column_parallel_input_gradient_not_summed(patch: pytest.MonkeyPatch) -> None:
    def forward(self: ColumnParallelLinear, input: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        output = _Linear.apply(input, self.weight, self.context.weight_gradients, None, False)
        return output if self.bias is None or not with_bias else output + self.bias

    patch.setattr(ColumnParallelLinear, "forward", forward)


def gathered_keys_and_values_not_summed_in_backward(patch: pytest.MonkeyPatch) -> None:
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.chunk(ctx.group.size, dim=-1)[ctx.group.rank], None

    patch.setattr(_GatherFeatures, "backward", staticmethod(backward))


def every_rank_takes_the_groups_of_the_first(patch: pytest.MonkeyPatch) -> None:
    def groups(self: SelfAttention, features: torch.Tensor) -> torch.Tensor:
        gathered = gather_features(features, self.tp).unflatten(-1, (self.num_groups, self.head_dim))
        return gathered.index_select(2, torch.arange(self.local_heads) // (self.num_heads // self.num_groups))

    patch.setattr(SelfAttention, "_groups", groups)


# Operations at their latest: these changes are no bugs, but show whether somebody waits


def _run_when_waited_for(patch: pytest.MonkeyPatch, start: str, under_way: str) -> None:
    start_now = getattr(Bucket, start)

    def start_late(self: Bucket) -> None:
        def run() -> None:
            start_now(self)
            getattr(self, under_way).wait()

        setattr(self, under_way, Work(run))

    patch.setattr(Bucket, start, start_late)


def reductions_run_when_waited_for(patch: pytest.MonkeyPatch) -> None:
    _run_when_waited_for(patch, "start_reduction", "_reducing")


def gathers_run_when_waited_for(patch: pytest.MonkeyPatch) -> None:
    _run_when_waited_for(patch, "start_gather", "_gathering")


# Reduction of gradients

SKIPPED_BUCKET = "decoder.layers.1.mlp.down.weight"


def bucket_not_reduced(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        for bucket in engine.reducer.buckets:
            names = [piece.name for member in bucket.members for piece in description_of(member.parameter).pieces]
            if SKIPPED_BUCKET in names:
                patch.setattr(bucket, "start_reduction", lambda: None)

    return prepare


def bucket_reduced_before_its_last_micro_batch(patch: pytest.MonkeyPatch) -> None:
    start_step, start_reduction = GradientReducer.start_step, Bucket.start_reduction

    def expects_one_less(self: GradientReducer, num_micro_batches: int) -> None:
        start_step(self, num_micro_batches)
        self._remaining = dict.fromkeys(self._home, num_micro_batches - 1)

    def at_once(self: Bucket) -> None:
        # Waiting here makes the outcome the same in every run.
        start_reduction(self)
        self.finish_reduction()

    patch.setattr(GradientReducer, "start_step", expects_one_less)
    patch.setattr(Bucket, "start_reduction", at_once)


def gradients_used_before_they_are_reduced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Bucket, "finish_reduction", lambda self: None)


def buffer_cleared_while_it_is_reduced(patch: pytest.MonkeyPatch) -> None:
    start_reduction = Bucket.start_reduction

    def start_and_clear(self: Bucket) -> None:
        start_reduction(self)
        self.gradient.zero_()

    patch.setattr(Bucket, "start_reduction", start_and_clear)


def gradients_of_the_last_step_left_in_the_buffer(patch: pytest.MonkeyPatch) -> None:
    start_step = GradientReducer.start_step

    def keep(self: GradientReducer, num_micro_batches: int) -> None:
        kept = [bucket.gradient.clone() for bucket in self.buckets]
        start_step(self, num_micro_batches)
        for bucket, gradient in zip(self.buckets, kept, strict=True):
            bucket.gradient.copy_(gradient)

    patch.setattr(GradientReducer, "start_step", keep)


def tie_not_reduced(patch: pytest.MonkeyPatch) -> Prepare:
    def prepare(engine: Engine) -> None:
        for bucket in engine.reducer.buckets:
            bucket.tie_group = None

    return prepare


def tie_reduced_after_the_reduce_scatter(patch: pytest.MonkeyPatch) -> Prepare:
    """The tied weight shares buckets with others, so that its holders own different ranges of it."""
    key_of = megallm.data_parallel.buckets._key
    patch.setattr(
        megallm.data_parallel.buckets,
        "_key",
        lambda *arguments: replace(key_of(*arguments), tie=None),
    )
    finish_step = GradientReducer.finish_step

    def prepare(engine: Engine) -> None:
        def reduce_ties_last(self: GradientReducer) -> None:
            finish_step(self)
            for bucket in self.buckets:
                for member in bucket.members:
                    if description_of(member.parameter).tie is not None:
                        engine.mesh.tie.all_reduce(bucket.gradient_of(member))

        patch.setattr(GradientReducer, "finish_step", reduce_ties_last)

    return prepare


def replicated_weights_reduced_over_data_ranks_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mesh, "group_over", lambda self, axes: self.dp)


def cut_weights_reduced_over_tensor_ranks_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mesh, "group_over", lambda self, axes: self.tp_dp)


# The distributed optimizer


def optimizer_owns_the_next_range(patch: pytest.MonkeyPatch) -> None:
    initialize = Bucket.__init__

    def with_next_range(self: Bucket, *arguments: Any) -> None:
        initialize(self, *arguments)
        if self.sharded:
            part = self.weights.numel() // self.group.size
            following = (self.group.rank + 1) % self.group.size
            self.shard = slice(following * part, (following + 1) * part)

    patch.setattr(Bucket, "__init__", with_next_range)


def updated_ranges_not_gathered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Bucket, "start_gather", lambda self: None)


def forward_does_not_wait_for_the_gather(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(megallm.data_parallel.reducer, "_wait_for_weights_before_use", lambda chunk, home: None)


# The pipeline


def with_forwards_swapped(lowered: LoweredSchedule) -> LoweredSchedule:
    """The first rank takes micro-batches 0 and 1 in the other order, of which the next rank knows nothing."""
    swapped: dict[int | None, int] = {0: 1, 1: 0}

    def swap(action: Action) -> Action:
        if action.stage != 0 or action.kind not in (Kind.F, Kind.SEND_F):
            return action
        return action._replace(micro_batch=swapped.get(action.micro_batch, action.micro_batch))

    first = tuple(
        step._replace(action=swap(step.action), awaits=tuple(map(swap, step.awaits))) for step in lowered.steps[0]
    )
    return replace(lowered, steps=(first, *lowered.steps[1:]))


def with_one_slot(lowered: LoweredSchedule) -> LoweredSchedule:
    """Every message is received into the same buffer."""
    steps = tuple(
        tuple(step if step.slot is None else step._replace(slot=0) for step in steps) for steps in lowered.steps
    )
    return replace(lowered, steps=steps)


def _change_schedule(patch: pytest.MonkeyPatch, change: Callable[[LoweredSchedule], LoweredSchedule]) -> Prepare:
    def prepare(engine: Engine) -> None:
        # Only once the engine is built: it refuses such a schedule.
        schedule = engine.schedule
        patch.setattr(engine, "schedule", lambda *arguments: change(schedule(*arguments)))

    return prepare


def stage_takes_the_activations_of_another_micro_batch(patch: pytest.MonkeyPatch) -> Prepare:
    return _change_schedule(patch, with_forwards_swapped)


def activations_overwritten_before_their_backward(patch: pytest.MonkeyPatch) -> Prepare:
    return _change_schedule(patch, with_one_slot)


def last_micro_batch_has_no_backward(patch: pytest.MonkeyPatch) -> None:
    backward = PipelineExecutor._backward

    def leave_out_last(self: PipelineExecutor, run: Any, lowered: Any, step: Any) -> None:
        if step.action.micro_batch == len(run.micro_batches) - 1:
            run.saved.pop((step.action.stage, step.action.micro_batch))
        else:
            backward(self, run, lowered, step)

    patch.setattr(PipelineExecutor, "_backward", leave_out_last)


def message_used_before_it_arrives(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PipelineExecutor, "_wait_for_input", lambda self, run, action: None)


def message_overwritten_while_it_is_sent(patch: pytest.MonkeyPatch) -> Prepare:
    send = Channel.send

    def send_and_clear(self: Channel, tensor: torch.Tensor) -> Work:
        work = send(self, tensor)
        tensor.detach().zero_()
        return work

    def prepare(engine: Engine) -> None:
        # Only once the engine is built: it sends messages of its own.
        patch.setattr(Channel, "send", send_and_clear)

    return prepare
