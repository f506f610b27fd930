"""Bytes of one process by kind, at the moment of a step when they are most. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from megallm.config.resolve import GATED_ACTIVATIONS, rotary_width
from megallm.plan.gpus import COMMUNICATOR_BYTES, CONTEXT_BYTES
from megallm.plan.schedule import order_of_rank, peak_micro_batches
from megallm.plan.stages import Layout, Stage
from megallm.schedule import Action, Kind, LoweredSchedule
from megallm.schedule.lowering import MAX_OUTSTANDING_SENDS

KINDS = (
    "weights",
    "gradients",
    "master weights",
    "moments",
    "activations",
    "logits",
    "working memory",
    "buffers",
    "communicators",
)
"""What memory holds. `activations` and `logits` are what micro-batches keep for their backward passes; `working memory`
what one forward or backward pass needs for itself, an estimate; `buffers` messages, the batch and tables."""

BYTES_OF_A_TOKEN = 8 + 8 + 8 + 4
"""Of a batch on the device: token, label, position, loss mask."""
BYTES_MORE_OF_BERT = 8 + 8
"""Its type, and whether it is padding."""


def state_bytes(layout: Layout, rank: int) -> dict[str, int]:
    """Weights, gradients, master weights and moments of a process on a pipeline rank. Padding of buckets is left out:
    up to 63 elements of each tensor and of each rank's part of a bucket, none where sizes are multiples of 64.

    With 16-bit weights master weights are float32. With the distributed optimizer master weights and moments are
    divided among the ranks over which a parameter's gradient is reduced.
    """
    sizes = layout.sizes
    total = sum(stage.parameters.total for stage in layout.on_rank(rank))
    own = updated_elements(layout, rank)
    return {
        "weights": total * sizes.element,
        "gradients": total * sizes.wide,
        "master weights": own * sizes.wide if sizes.element == 2 else 0,
        "moments": (2 if layout.config.optimizer.optimizer == "adam" else 1) * own * sizes.wide,
    }


def updated_elements(layout: Layout, rank: int) -> int:
    """Elements of parameters that a process on a pipeline rank updates, and of which it keeps the optimizer's state."""
    held = [stage.parameters for stage in layout.on_rank(rank)]
    total = sum(parameters.total for parameters in held)
    if not layout.config.parallel.use_distributed_optimizer:
        return total
    over_both = sum(parameters.over_tensor_and_data for parameters in held)
    return -(-(total - over_both) // layout.data) - (-over_both // (layout.data * layout.tensor))


def memory_of_rank(layout: Layout, rank: int, lowered: LoweredSchedule, *, with_passing: bool = True) -> dict[str, int]:
    """Bytes by kind (`KINDS`) of a process on a pipeline rank at the peak of a step.

    `lowered` may have fewer micro-batches than the step. Under GPipe those that are missing are held too, each with its
    input. Of the other schedules the rank's order in the step tells what it holds, and a buffer comes with each input
    that it holds more, which is exact but for a few buffers. Without `with_passing` only what stays between passes
    counts: no working memory, no messages that leave.
    """
    schedule, number, parallel = lowered.schedule, layout.num_micro_batches, layout.config.parallel
    slots = lowered.num_activation_slots[rank] + lowered.num_gradient_slots[rank]
    actions: Sequence[Action] = schedule.actions[rank]
    if schedule.num_micro_batches < number and schedule.name != "gpipe":
        assert schedule.max_in_flight is not None, "a builder made the schedule"
        actions, in_flight = order_of_rank(parallel, rank, peak_micro_batches(parallel, number))
        slots += _inputs_held(rank, actions, in_flight)
        slots -= _inputs_held(rank, schedule.actions[rank], schedule.max_in_flight[rank])
    peak = peak_of_step(layout, rank, actions, with_passing=with_passing)
    if schedule.num_micro_batches < number and schedule.name == "gpipe":
        assert layout.virtual == 1, "GPipe has one stage on a rank, where all that is held is held at once"
        for stage in layout.on_rank(rank):
            missing = number - schedule.num_micro_batches
            peak["activations"] += missing * layout.kept(stage)
            peak["logits"] += missing * layout.kept_logits(stage)
            slots += missing * (not stage.is_first)
    return {
        **state_bytes(layout, rank),
        **peak,
        "buffers": buffer_bytes(layout, rank, slots, with_passing=with_passing),
        "communicators": _communicators(layout),
    }


def _inputs_held(rank: int, actions: Sequence[Action], in_flight: int) -> int:
    """Inputs that a rank holds at most at once: those of all that is in flight, but the first stage receives none."""
    if rank > 0:
        return in_flight
    forward = Kind.F
    return max(accumulate((stage > 0) * (1 if kind is forward else -1) for kind, stage, _ in actions))


def peak_of_step(layout: Layout, rank: int, actions: Iterable[Action], *, with_passing: bool = True) -> dict[str, int]:
    """Activations, logits and working memory of the action at which they are most together, in a rank's order."""
    stages = {stage.number: stage for stage in layout.on_rank(rank)}
    kept = {number: (layout.kept(stage), layout.kept_logits(stage)) for number, stage in stages.items()}
    working = {
        kind: {number: _working_memory(layout, stage, kind) if with_passing else 0 for number, stage in stages.items()}
        for kind in (Kind.F, Kind.B)
    }
    forward, forward_working, backward_working = Kind.F, working[Kind.F], working[Kind.B]
    activations = logits = most = 0
    peak = (0, 0, 0)
    for kind, stage, _ in actions:
        of_activations, of_logits = kept[stage]
        if kind is forward:
            activations += of_activations
            logits += of_logits
        passing = (forward_working if kind is forward else backward_working)[stage]
        if activations + logits + passing > most:
            most = activations + logits + passing
            peak = (activations, logits, passing)
        if kind is not forward:
            activations -= of_activations
            logits -= of_logits
    return {"activations": peak[0], "logits": peak[1], "working memory": peak[2]}


def _working_memory(layout: Layout, stage: Stage, kind: Kind) -> int:
    """An estimate: gradients inside an MLP and of its gathered input; layers computed again. Or, where the logits are
    made in chunks, one of these, with the gathered input of the output layer and its gradient.

    The gradient of the logits is written over them.
    """
    sizes = layout.sizes
    whole = sizes.tokens * layout.config.model.hidden_size * sizes.element
    inner = (3 if layout.config.model.activation in GATED_ACTIVATIONS else 2) * sizes.ffn
    in_layer = 0
    if stage.layers:
        in_layer = inner + 2 * whole + layout.recomputed_bytes(stage) if kind is Kind.B else whole
        in_layer += inner if kind is Kind.B and sizes.recomputes("mlp") else 0
    in_loss = 0
    if stage.is_last and sizes.chunk_of_logits:
        in_loss = sizes.chunk_of_logits + (2 if kind is Kind.B else 1) * whole
    return max(in_layer, in_loss)


def buffer_bytes(layout: Layout, rank: int, slots: int, *, with_passing: bool = True) -> int:
    """Messages that arrive (`slots` of them) and leave, the rank's share of the batch, and tables of positions."""
    sizes, config = layout.sizes, layout.config
    leaving = 2 * MAX_OUTSTANDING_SENDS if layout.pipeline > 1 and with_passing else 0
    document_ids = 8 if config.data.reset_attention_mask else 0
    bert = BYTES_MORE_OF_BERT if config.model.architecture == "bert" else 0
    batch = layout.num_micro_batches * sizes.tokens * (BYTES_OF_A_TOKEN + document_ids + bert)
    length = config.model.max_position_embeddings or sizes.sequence
    tables = 0
    if config.model.position_embedding_type == "rope":
        tables = len(layout.on_rank(rank)) * 2 * length * rotary_width(config.model) * sizes.wide
    elif config.model.position_embedding_type == "sinusoidal" and rank == 0:
        tables = length * config.model.hidden_size * sizes.element
    return (slots + leaving) * sizes.hidden + batch + tables


def num_communicators(layout: Layout) -> int:
    """NCCL communicators of a process: one for each of its groups that is no smaller copy of another, four to its
    pipeline neighbours."""
    tensor, data, pipeline = layout.tensor, layout.data, layout.pipeline
    sizes = {"tensor": tensor, "data": data, "pipeline": pipeline, "world": layout.world_size}
    number = sum(size > 1 for name, size in sizes.items() if name == "world" or size != layout.world_size)
    number += tensor > 1 and data > 1 and pipeline > 1
    number += pipeline > 2  # first and last rank, for tied weights
    return number + (0 if pipeline == 1 else 2 if pipeline == 2 else 4)


def _communicators(layout: Layout) -> int:
    return CONTEXT_BYTES + num_communicators(layout) * COMMUNICATOR_BYTES if layout.on_gpu else 0
