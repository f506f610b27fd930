"""What a step sends, and how long it takes on a GPU by its stated rates. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megallm.plan.flops import flops_per_token, head_flops_per_token
from megallm.plan.gpus import Gpu
from megallm.plan.memory import state_bytes, updated_elements
from megallm.plan.parameters import layer_parameters
from megallm.plan.schedule import schedule_of
from megallm.plan.stages import Layout, Stage
from megallm.schedule import Costs, LoweredSchedule, Timeline, lower, simulate

# Every tensor that is kept is written, read by what follows, read again in the backward pass, and has its gradient
# written and read: of this one forward pass does a third. (A fused Llama layer moves 2.8 times what it keeps.)
TRAFFIC_PER_KEPT_BYTE = 3.0

# Operators that a layer starts in its forward pass; its backward pass starts about twice as many.
_OPERATORS = 40

# Messages of a layer that nothing hides, each of the hidden states of all tokens: all-gathers and reduce-scatters, or
# all-reduces, which are as much as one of each. (docs/parallelism.md says which are hidden.)
_EXPOSED_FORWARD, _EXPOSED_BACKWARD_WITH_SEQUENCE = 4, 2


@dataclass(frozen=True)
class Traffic:
    """Messages of a process in a step: how many, and the bytes that it sends."""

    messages: float
    sent: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to, those of the slowest rank; what is hidden behind work is left out."""

    timeline: Timeline  # of the schedule, in seconds, perhaps of fewer micro-batches than the step has
    pipeline: float  # all forward and backward passes, with their waiting
    bubble: float  # share of `pipeline` in which a rank computes nothing, over all ranks
    gradients: float
    parameters: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.pipeline + self.gradients + self.parameters + self.optimizer


def stage_costs(layout: Layout, gpu: Gpu) -> Costs:
    """Seconds of each stage's forward and backward pass of one micro-batch, and of a message between stages."""
    forward, backward = stage_seconds(layout, gpu)
    return Costs(forward, backward, _message_seconds(layout, gpu))


def _message_seconds(layout: Layout, gpu: Gpu) -> float:
    within_machine = layout.world_size <= gpu.per_machine
    return layout.sizes.hidden / ((gpu.link if within_machine else gpu.network) * gpu.efficiencies.link)


def stage_seconds(layout: Layout, gpu: Gpu) -> tuple[list[float], list[float]]:
    """Of each stage the seconds of a micro-batch's forward pass, and those of its backward pass."""
    examples = {(len(stage.layers), stage.is_last): stage for stage in layout.stages}
    kinds = {kind: _stage_seconds(layout, gpu, stage) for kind, stage in examples.items()}
    seconds = [kinds[len(stage.layers), stage.is_last] for stage in layout.stages]
    return [forward for forward, _ in seconds], [backward for _, backward in seconds]


def _stage_seconds(layout: Layout, gpu: Gpu, stage: Stage) -> tuple[float, float]:
    config, sizes, num_layers = layout.config, layout.sizes, len(stage.layers)
    flops = flops_per_token(config.model, sizes.sequence)
    head = head_flops_per_token(config.model, sizes.sequence)
    per_layer = (flops.weights - head) / config.model.num_layers / 3  # forward
    products = (num_layers * per_layer + (head / 3 if stage.is_last else 0)) * sizes.tokens / layout.tensor
    attention = num_layers * (flops.half - flops.weights) / config.model.num_layers / 3 * sizes.tokens / layout.tensor
    peak = gpu.flops if sizes.element == 2 else gpu.flops_32
    product_seconds = products / (peak * gpu.efficiencies.product)
    attention_seconds = attention / (peak * gpu.efficiencies.attention)
    kept = num_layers * layout.layer_bytes + (3 * sizes.logits if stage.is_last else 0)
    traffic = TRAFFIC_PER_KEPT_BYTE * kept / 3 / (gpu.bandwidth * gpu.efficiencies.bandwidth)
    sent_forward, sent_backward = _tensor_seconds(layout, gpu)
    traffic += _OPERATORS * gpu.operator_seconds * (num_layers + 1)
    forward = product_seconds + attention_seconds + traffic + num_layers * sent_forward
    backward = 2 * (product_seconds + attention_seconds + traffic) + num_layers * sent_backward
    if num_layers:
        backward += layout.recomputed_layers(stage) / num_layers * forward
    if stage.is_last and sizes.chunk_of_logits:
        backward += head / 3 * sizes.tokens / layout.tensor / (peak * gpu.efficiencies.product)
    if sizes.recomputes("core_attn"):
        backward += attention_seconds
    if sizes.recomputes("mlp"):
        backward += product_seconds * _share_of_mlp(layout)
    return forward, backward


def _share_of_mlp(layout: Layout) -> float:
    """Share of a layer's matrices that stands in its MLP."""
    matrices = {name: it.elements for name, it in layer_parameters(layout.config.model).items() if it.is_matrix}
    return sum(size for name, size in matrices.items() if name.startswith("mlp.")) / sum(matrices.values())


def _tensor_seconds(layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """Exposed communication of a layer over the tensor ranks, forward and backward."""
    if layout.tensor == 1:
        return 0.0, 0.0
    rate = (gpu.link if layout.tensor <= gpu.per_machine else gpu.network) * gpu.efficiencies.link
    whole = layout.sizes.tokens * layout.config.model.hidden_size * layout.sizes.element
    one = whole * (layout.tensor - 1) / layout.tensor / rate
    backward = _EXPOSED_BACKWARD_WITH_SEQUENCE if layout.config.parallel.sequence_parallel else 0
    return _EXPOSED_FORWARD * one, backward * one


def step_time(layout: Layout, gpu: Gpu, lowered: LoweredSchedule) -> StepTime:
    """The time of a step whose schedule is `lowered`.

    A schedule of fewer micro-batches than the step has stands for the step: each further one takes as long as the
    busiest rank computes for it. Under GPipe, where all stages wait for the slowest in each direction, it takes as long
    as the last one that is there.
    """
    costs = stage_costs(layout, gpu)
    timeline = simulate(lowered, costs)
    forward, backward = costs.per_stage(lowered.schedule)
    busy = [
        sum(forward[stage.number] + backward[stage.number] for stage in layout.on_rank(rank))
        for rank in range(layout.pipeline)
    ]
    missing = layout.num_micro_batches - lowered.schedule.num_micro_batches
    another = max(busy)
    if missing and lowered.schedule.name == "gpipe":
        assert layout.virtual == 1, "GPipe has one stage on a rank; with more another micro-batch takes more"
        fewer = schedule_of(layout.config.parallel, lowered.schedule.num_micro_batches - 1)
        another = timeline.makespan - simulate(lower(fewer), costs).makespan
    pipeline = timeline.makespan + missing * another
    bubble = max(0.0, 1.0 - sum(busy) * layout.num_micro_batches / (layout.pipeline * pipeline))
    ends = [end_of_step(layout, gpu, rank, forward, backward) for rank in range(layout.pipeline)]
    return StepTime(Timeline(timeline.name, timeline.events, "s"), pipeline, bubble, *max(ends, key=sum))


def shortest_step(layout: Layout, gpu: Gpu) -> float:
    """Seconds that a step takes at least, by whatever schedule: before a rank's first pass a micro-batch has gone
    through the first stages of the ranks before it, and after its last pass one goes back through them."""
    forward, backward = stage_seconds(layout, gpu)
    message, micro_batches = _message_seconds(layout, gpu), layout.num_micro_batches
    there_and_back, shortest = 0.0, 0.0
    for rank in range(layout.pipeline):
        busy = sum(forward[stage.number] + backward[stage.number] for stage in layout.on_rank(rank))
        shortest = max(shortest, there_and_back + micro_batches * busy)
        there_and_back += forward[rank] + backward[rank] + 2 * message
    return shortest + max(sum(end_of_step(layout, gpu, rank, forward, backward)) for rank in range(layout.pipeline))


def end_of_step(
    layout: Layout, gpu: Gpu, rank: int, forward: list[float], backward: list[float]
) -> tuple[float, float, float]:
    """Seconds of a rank for gradients, parameters and the update, as far as nothing hides them."""
    parallel, stages = layout.config.parallel, layout.on_rank(rank)
    state = state_bytes(layout, rank)
    within_machine = layout.tensor * layout.data <= gpu.per_machine
    rate = (gpu.link if within_machine else gpu.network) * gpu.efficiencies.link
    gradients = reduction_bytes(layout, rank) / rate
    parameters = gather_bytes(layout, rank) / rate
    if parallel.overlap_grad_reduce:
        gradients = max(0.0, gradients - sum(backward[stage.number] for stage in stages))
    if parallel.overlap_param_gather:
        parameters = max(0.0, parameters - sum(forward[stage.number] for stage in stages))
    # Reads the gradient once; reads and writes moments and masters; writes the weights.
    share = updated_elements(layout, rank) / max(1, _elements(layout, rank))
    moved = state["gradients"] * share + 2 * state["moments"] + 2 * state["master weights"] + state["weights"] * share
    moved += state["weights"] * share if layout.sizes.element > 2 else 0
    return gradients, parameters, moved / (gpu.bandwidth * gpu.efficiencies.bandwidth)


def reduction_bytes(layout: Layout, rank: int) -> float:
    """What a process sends to reduce its gradients over the data ranks."""
    times = 1 if layout.config.parallel.use_distributed_optimizer else 2
    return times * _elements(layout, rank) * layout.sizes.wide * (layout.data - 1) / layout.data


def gather_bytes(layout: Layout, rank: int) -> float:
    """What a process sends to collect updated parameters."""
    if not layout.config.parallel.use_distributed_optimizer:
        return 0.0
    return _elements(layout, rank) * layout.sizes.element * (layout.data - 1) / layout.data


def traffic(layout: Layout) -> dict[str, Traffic]:
    """Messages and bytes of a step by axis, of the process that sends most."""
    sizes, micro_batches = layout.sizes, layout.num_micro_batches
    found = {}
    if layout.tensor > 1:
        whole = sizes.tokens * layout.config.model.hidden_size * sizes.element
        part = whole * (layout.tensor - 1) / layout.tensor
        # With sequence parallelism 4 forward and 6 backward; without 2 and 2 all-reduces, of twice the bytes.
        number, bytes_each = (10, part) if layout.config.parallel.sequence_parallel else (4, 2 * part)
        if layout.config.training.recompute_granularity == "full":
            number += 4 if layout.config.parallel.sequence_parallel else 2
        layers = max(sum(len(stage.layers) for stage in layout.on_rank(rank)) for rank in range(layout.pipeline))
        found["tensor"] = Traffic(layers * number * micro_batches, layers * number * micro_batches * bytes_each)
    if layout.pipeline > 1:
        # Forward from every stage but the last, backward from every stage but the first.
        sends = max(
            sum((not stage.is_last) + (not stage.is_first) for stage in layout.on_rank(rank))
            for rank in range(layout.pipeline)
        )
        found["pipeline"] = Traffic(sends * micro_batches, sends * micro_batches * sizes.hidden)
    if layout.data > 1:
        sent = [reduction_bytes(layout, rank) + gather_bytes(layout, rank) for rank in range(layout.pipeline)]
        heaviest = sent.index(max(sent))
        buckets = len(layout.on_rank(heaviest)) * -(
            -_elements(layout, heaviest)
            // (len(layout.on_rank(heaviest)) * (layout.config.parallel.ddp_bucket_size or 1))
        )
        collectives = buckets * (2 if layout.config.parallel.use_distributed_optimizer else 1)
        found["data"] = Traffic(collectives, max(sent))
    return found


def _elements(layout: Layout, rank: int) -> int:
    return sum(stage.parameters.total for stage in layout.on_rank(rank))
