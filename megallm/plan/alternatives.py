"""Other ways to run the same model and batch: the fastest that fit, and single changes that make a plan fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice, product
from typing import Any

from megallm.config.resolve import resolve
from megallm.config.tree import Config
from megallm.plan.gpus import SAFE_SHARE, Gpu
from megallm.plan.memory import buffer_bytes, peak_of_step, state_bytes
from megallm.plan.plan import Plan, make_plan
from megallm.plan.schedule import order_of_rank, peak_micro_batches
from megallm.plan.stages import Layout
from megallm.plan.timing import end_of_step, shortest_step, stage_seconds
from megallm.plan.validate import validate

# Of the layouts that were estimated, as many pairs of sizes are planned in full, each with its best settings; and so
# many forwards of each are timed one by one.
_PLANNED = 8
_PLANNED_OF_EACH = 4
_TIMED = 400
# Passes and messages of all of them that may be timed before it takes too long (about a second).
_ENOUGH_TIMED = 40_000
_CLEARLY_FASTER = 0.99

# Tokens whose logits exist at once. With fewer than about 700 (on an H200), adding to the weight's gradient, which each
# chunk reads and writes, takes longer than the product that is added.
_LOSS_CHUNK = 1024

_Option = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """A changed configuration: the flags that differ from the one before, and what comes of them."""

    flags: tuple[str, ...]
    plan: Plan


def next_best(plan: Plan, number: int) -> list[Plan]:
    """The fastest plans that fit the GPU, over tensor, pipeline and virtual sizes, micro-batch and recomputation.

    Model, batch, precision and everything else stay as they are; the distributed optimizer is on. All layouts are
    ranked by a short estimate, and the best of them planned like the given one: many of few stages, of many stages
    hardly more than `number`. `number` at most, fastest first; the given sizes are named again only where something
    else makes them clearly faster.
    """
    layout, gpu = plan.layout, plan.gpu
    estimated: list[tuple[float, int, Layout]] = []
    for config in _configurations(layout):
        candidate = Layout(config, layout.world_size)
        seconds, peak = _estimate(candidate, gpu)
        if peak <= SAFE_SHARE * gpu.memory:
            estimated.append((seconds, len(estimated), candidate))
    # One plan for each way to share the work: of micro-batches and virtual stages the best.
    best: dict[tuple[int, int], Plan] = {}
    given = (layout.tensor, layout.pipeline)
    planned: Counter[tuple[int, int]] = Counter()
    timed = 0
    for _, _, candidate in sorted(estimated):
        if timed > _ENOUGH_TIMED and len(best) >= number:
            break
        key = (candidate.tensor, candidate.pipeline)
        planned[key] += 1
        if planned[key] > _PLANNED_OF_EACH:
            continue
        if len(planned) > _PLANNED:
            break
        # What cannot be faster than its like, or than those that will be named, need not be timed.
        others = sorted(other.step.total for place, other in best.items() if place != given)
        named = [best[key].step.total] if key in best else others[number - 1 : number]
        if named and shortest_step(candidate, gpu) > named[0]:
            continue
        made = make_plan(candidate, gpu, _TIMED)
        timed += len(made.step.timeline.events)
        if made.fits and (key not in best or made.step.total < best[key].step.total):
            best[key] = made
    if given in best and best[given].step.total > _CLEARLY_FASTER * plan.step.total:
        del best[given]
    return sorted(best.values(), key=lambda other: other.step.total)[:number]


def _configurations(layout: Layout) -> Iterator[Config]:
    """Valid configurations for the same processes, model and batch."""
    config, world_size = layout.config, layout.world_size
    tensors = [size for size in (1, 2, 4, 8) if world_size % size == 0]
    pipelines = [size for size in range(1, min(config.model.num_layers, 32) + 1) if world_size % size == 0]
    # Without dropout the core of attention keeps next to nothing that could be computed again.
    recomputed = (None, "selective", "full") if config.model.attention_dropout else (None, "full")
    batches = [size for size in (1, 2, 4, 8) if size <= 2 * config.training.micro_batch_size]
    for tensor, pipeline, micro_batch in product(tensors, pipelines, batches):
        chunks = [1, 2, 4] if pipeline > 1 else [1]
        model_parallel = tensor * pipeline
        if world_size % model_parallel or (config.training.global_batch_size or 0) % (
            micro_batch * (world_size // model_parallel)
        ):
            continue
        for virtual, recompute in product(chunks, recomputed):
            if virtual * pipeline > config.model.num_layers:
                continue
            changed = with_changes(
                config,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                num_virtual_stages_per_pipeline_rank=virtual,
                micro_batch_size=micro_batch,
                recompute_granularity=recompute,
                use_distributed_optimizer=True,
            )
            if not validate(changed, world_size):
                yield resolve(changed, world_size)


def with_changes(config: Config, **changes: Any) -> Config:
    """`config` with other values in the sections of parallelism and training; the split of layers is by cost again
    where the stages become others."""
    parallel, training = config.parallel, config.training
    for name, value in changes.items():
        if hasattr(training, name):
            training = replace(training, **{name: value})
        else:
            parallel = replace(parallel, **{name: value})
    sizes = ("pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank")
    if training.recompute_granularity != config.training.recompute_granularity:
        training = replace(
            training, recompute_method="uniform", recompute_num_layers=1, recompute_modules=["core_attn"]
        )
    if any(getattr(parallel, name) != getattr(config.parallel, name) for name in sizes):
        parallel = replace(
            parallel,
            pipeline_schedule="auto",
            pipeline_model_parallel_layout=None,
            decoder_first_pipeline_num_layers=None,
            decoder_last_pipeline_num_layers=None,
            microbatch_group_size_per_virtual_pipeline_stage=None,
        )
    return replace(config, parallel=parallel, training=training)


def _estimate(layout: Layout, gpu: Gpu) -> tuple[float, int]:
    """Seconds of a step by the formula of its bubble, and the peak of the first rank without its communicators."""
    forward, backward = stage_seconds(layout, gpu)
    number, ranks = layout.num_micro_batches, layout.pipeline
    busy = [
        sum(forward[stage.number] + backward[stage.number] for stage in layout.on_rank(rank)) for rank in range(ranks)
    ]
    # The busiest rank works all the time but for one pass through the others' stages of one virtual stage each.
    seconds = number * max(busy) + (sum(busy) - max(busy)) / layout.virtual
    seconds += sum(end_of_step(layout, gpu, 0, forward, backward))
    peak = sum(state_bytes(layout, 0).values())
    parallel = layout.config.parallel
    actions, in_flight = order_of_rank(parallel, 0, peak_micro_batches(parallel, number))
    peak += sum(peak_of_step(layout, 0, actions).values())
    return seconds, peak + buffer_bytes(layout, 0, in_flight)


def changes_that_fit(plan: Plan, number: int = 3, memory: int | None = None) -> list[Change]:
    """Changes to a plan that does not fit which make it fit: single ones, and pairs where those are too few.

    `memory` is that of the device in bytes; default: the GPU's. Of each kind the fastest come first.
    """
    bound = SAFE_SHARE * (memory or plan.gpu.memory)
    options = _single_changes(plan.layout)
    found: list[Change] = []
    for group in ([(option,) for option in options], list(combinations(options, 2))):
        fitting = islice(_fitting(plan, group, bound), number - len(found))
        found += sorted(fitting, key=lambda change: change.plan.step.total)
    return found


def _single_changes(layout: Layout) -> list[_Option]:
    """Flags with the settings that they stand for."""
    parallel, training = layout.config.parallel, layout.config.training
    options: list[_Option] = []
    if not parallel.use_distributed_optimizer and layout.data > 1:
        options.append(("--use-distributed-optimizer", {"use_distributed_optimizer": True}))
    if training.recompute_granularity is None and layout.config.model.attention_dropout:
        options.append(("--recompute-granularity selective", {"recompute_granularity": "selective"}))
    tokens = training.micro_batch_size * layout.config.data.seq_length
    if not training.loss_chunk_size and tokens > _LOSS_CHUNK:
        options.append((f"--loss-chunk-size {_LOSS_CHUNK}", {"loss_chunk_size": _LOSS_CHUNK}))
    if training.recompute_granularity != "full":
        options.append(("--recompute-granularity full", {"recompute_granularity": "full"}))
    half = training.micro_batch_size // 2
    while half:
        options.append((f"--micro-batch-size {half}", {"micro_batch_size": half}))
        half //= 2
    for axis in ("tensor", "pipeline"):
        given = getattr(layout, axis)
        for size in (2 * given, 4 * given, 8 * given):
            # A tensor group that leaves its machine is slower than any other way.
            if size <= (8 if axis == "tensor" else layout.world_size):
                options.append((f"--{axis}-model-parallel-size {size}", {f"{axis}_model_parallel_size": size}))
    return options


def _fitting(plan: Plan, options: Sequence[Sequence[_Option]], bound: float) -> Iterator[Change]:
    """Those that fit, by their estimated time."""
    layout = plan.layout
    estimated: list[tuple[float, int, Layout]] = []
    for place, option in enumerate(options):
        settings = {name: value for _, setting in option for name, value in setting.items()}
        changed = with_changes(layout.config, **settings)
        # Two values of one setting are no pair.
        if len(settings) < len(option) or validate(changed, layout.world_size):
            continue
        candidate = Layout(resolve(changed, layout.world_size), layout.world_size, layout.on_gpu)
        seconds, peak = _estimate(candidate, plan.gpu)
        if peak <= bound:
            estimated.append((seconds, place, candidate))
    for _, place, candidate in sorted(estimated):
        made = make_plan(candidate, plan.gpu, _TIMED)
        if made.peak <= bound:
            yield Change(tuple(flag for flag, _ in options[place]), made)
