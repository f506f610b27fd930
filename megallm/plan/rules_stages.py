"""Rules about the stages of the pipeline: how many there are, and which layers they hold."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.config.resolve import pipeline_schedule
from megallm.config.stage_layout import parse_stage_layout
from megallm.config.tree import Config
from megallm.plan.problem import Problem, rule

_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_LAYOUT = "--pipeline-model-parallel-layout"


@rule("parallel.pipeline_model_parallel_size", "parallel.num_virtual_stages_per_pipeline_rank")
def virtual_stages_need_pipeline(config: Config, world_size: int) -> Iterator[Problem]:
    """On one pipeline rank virtual stages would only cost."""
    stages = config.parallel.num_virtual_stages_per_pipeline_rank
    if stages > 1 and config.parallel.pipeline_model_parallel_size == 1:
        yield Problem(
            ("--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-size"),
            f"{stages} virtual stages are given, but there is one pipeline rank",
            "",
            "use --pipeline-model-parallel-size 2 or more, or --num-virtual-stages-per-pipeline-rank 1",
        )


@rule(
    "model.num_layers",
    "parallel.pipeline_model_parallel_size",
    "parallel.num_virtual_stages_per_pipeline_rank",
)
def layers_fill_stages(config: Config, world_size: int) -> Iterator[Problem]:
    """Every virtual stage holds a layer, or what is accounted for as one. They need not hold equally many."""
    layers, parallel = config.model.num_layers, config.parallel
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    accounted = parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    if layers + accounted >= pipeline * virtual or parallel.pipeline_model_parallel_layout is not None:
        return
    ways = [f"use --num-layers {pipeline * virtual - accounted} or more"]
    if layers // pipeline:
        ways.append(f"--num-virtual-stages-per-pipeline-rank {layers // pipeline}")
    else:
        ways.append(f"--pipeline-model-parallel-size {max(layers // virtual, 1)}")
    yield Problem(
        ("--num-layers", "--pipeline-model-parallel-size", "--num-virtual-stages-per-pipeline-rank"),
        f"{layers} layers leave some of {pipeline * virtual} stages empty; stages may be uneven, but each holds at "
        "least one layer",
        f"{layers}{f' + {accounted}' if accounted else ''} < {pipeline} x {virtual}",
        ", or ".join(ways),
    )


@rule("parallel.pipeline_schedule", "parallel.num_virtual_stages_per_pipeline_rank")
def schedule_fits_virtual_stages(config: Config, world_size: int) -> Iterator[Problem]:
    """Only the interleaved schedule has virtual stages, and it needs them."""
    virtual, schedule = config.parallel.num_virtual_stages_per_pipeline_rank, pipeline_schedule(config.parallel)
    if (schedule == "interleaved") == (virtual > 1):
        return
    if schedule == "interleaved":
        way_out = "use --num-virtual-stages-per-pipeline-rank 2 or more, or --pipeline-schedule 1f1b"
    else:
        way_out = "use --pipeline-schedule interleaved, or --num-virtual-stages-per-pipeline-rank 1"
    yield Problem(
        ("--pipeline-schedule", "--num-virtual-stages-per-pipeline-rank"),
        f"the schedule {schedule} does not run with {virtual} virtual stage{'s' if virtual > 1 else ''}",
        "",
        way_out,
    )


@rule("parallel.pipeline_model_parallel_size", "parallel.microbatch_group_size_per_virtual_pipeline_stage")
def micro_batch_groups_fill_the_pipeline(config: Config, world_size: int) -> Iterator[Problem]:
    """With a smaller group the first rank would wait for micro-batches that the last one has not finished."""
    group = config.parallel.microbatch_group_size_per_virtual_pipeline_stage
    pipeline = config.parallel.pipeline_model_parallel_size
    if group is not None and group < pipeline:
        yield Problem(
            ("--microbatch-group-size-per-virtual-pipeline-stage", "--pipeline-model-parallel-size"),
            f"groups of {group} micro-batches do not keep {pipeline} pipeline ranks busy",
            f"{group} < {pipeline}",
            f"use --microbatch-group-size-per-virtual-pipeline-stage {pipeline} or more, or leave it out",
        )


@rule()
def one_way_to_split_the_layers(config: Config, world_size: int) -> Iterator[Problem]:
    """A layout says everything; numbers of layers leave nothing to account for."""
    parallel = config.parallel
    ways = {
        _LAYOUT: parallel.pipeline_model_parallel_layout is not None,
        _FIRST: parallel.decoder_first_pipeline_num_layers is not None,
        _LAST: parallel.decoder_last_pipeline_num_layers is not None,
        "--account-for-embedding-in-pipeline-split": parallel.account_for_embedding_in_pipeline_split,
        "--account-for-loss-in-pipeline-split": parallel.account_for_loss_in_pipeline_split,
    }
    given = [flag for flag, is_given in ways.items() if is_given]
    kinds = {flag.split("-")[2] for flag in given}  # pipeline, decoder, account
    if len(kinds) > 1:
        kept = given[0].split("-")[2]
        others = [flag for flag in given if flag.split("-")[2] != kept]
        yield Problem(
            tuple(given),
            "each says by itself how the layers are split over the stages",
            "",
            f"keep {given[0]} and {', '.join(f'leave out {flag}' for flag in others)}",
        )


@rule(
    "model.num_layers",
    "parallel.pipeline_model_parallel_size",
    "parallel.num_virtual_stages_per_pipeline_rank",
)
def layout_of_stages_holds_the_model(config: Config, world_size: int) -> Iterator[Problem]:
    """A layout is readable, makes as many stages as there are, and holds every layer once."""
    parallel, layers = config.parallel, config.model.num_layers
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if parallel.pipeline_model_parallel_layout is None:
        return
    try:
        counts = parse_stage_layout(parallel.pipeline_model_parallel_layout)
    except ValueError as error:
        example = "Et*3|(tt|)*2tL"
        yield Problem((_LAYOUT,), str(error), "", f'write it as {_LAYOUT} "{example}", or leave out {_LAYOUT}')
        return
    if len(counts) != pipeline * virtual:
        ways = [f"write {pipeline * virtual - 1} bars between stages"]
        if len(counts) % pipeline == 0:
            ways.append(f"use --num-virtual-stages-per-pipeline-rank {len(counts) // pipeline}")
        yield Problem(
            (_LAYOUT, "--pipeline-model-parallel-size", "--num-virtual-stages-per-pipeline-rank"),
            f"the layout has {len(counts)} stages",
            f"{len(counts)} is not {pipeline} x {virtual}",
            ", or ".join(ways),
        )
    if sum(counts) != layers:
        yield Problem(
            (_LAYOUT, "--num-layers"),
            f"the layout has {sum(counts)} layers, the model {layers}",
            "",
            f"use --num-layers {sum(counts)}, or write {layers} times t",
        )


@rule(
    "model.num_layers",
    "parallel.pipeline_model_parallel_size",
    "parallel.num_virtual_stages_per_pipeline_rank",
    "parallel.decoder_first_pipeline_num_layers",
    "parallel.decoder_last_pipeline_num_layers",
)
def given_layers_leave_enough(config: Config, world_size: int) -> Iterator[Problem]:
    """The first and last rank have a layer for each of their stages, and so have the others."""
    parallel, layers = config.parallel, config.model.num_layers
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    pairs = {_FIRST: parallel.decoder_first_pipeline_num_layers, _LAST: parallel.decoder_last_pipeline_num_layers}
    given = {flag: number for flag, number in pairs.items() if number is not None}
    if not given or layers < pipeline * virtual:
        return
    if pipeline == 1:
        flags = ", ".join(f"leave out {flag}" for flag in given)
        yield Problem(
            (*given, "--pipeline-model-parallel-size"),
            "the one pipeline rank holds all layers",
            "",
            f"{flags}, or use --pipeline-model-parallel-size 2",
        )
        return
    others = pipeline - len(given)
    for flag, number in given.items():
        most = layers - sum(given.values()) + number - others * virtual
        fits = virtual <= number <= most if others else sum(given.values()) == layers and number >= virtual
        if not fits:
            best = max(virtual, min(number, most) if others else most)
            yield Problem(
                (flag, "--num-layers"),
                f"{number} layers on one rank leave {layers - sum(given.values())} to {others} other ranks; each of "
                f"their {virtual} stages holds at least one, and of its own too",
                f"{layers} layers over {pipeline} ranks",
                f"use {flag} {best}",
            )
            return
