"""A plan as text for one screen."""

from __future__ import annotations

from collections.abc import Sequence

from megallm.config.resolve import pipeline_schedule
from megallm.plan.alternatives import Change
from megallm.plan.gpus import GIB, SAFE_SHARE
from megallm.plan.memory import KINDS
from megallm.plan.plan import Plan
from megallm.plan.schedule import schedule_of
from megallm.plan.stages import Stage
from megallm.plan.timing import stage_costs
from megallm.schedule import lower, simulate, text_grid

WIDTH = 100
_MARGIN = 12
_MOST_DRAWN_RANKS = 32
_MOST_LINES_DRAWN = 8


def plan_text(plan: Plan, others: Sequence[Plan], changes: Sequence[Change], notes: Sequence[str] = ()) -> str:
    """The whole plan. `others` are the next best layouts, `changes` what would make it fit where it does not."""
    parts = [_heading(plan), _model(plan), _stages(plan), _memory(plan), _schedule(plan), _time(plan)]
    if changes or not plan.fits:
        parts.append(_changes(plan, changes))
    if others:
        parts.append(_others(plan, others))
    parts += [f"{'note' if number == 0 else '':<{_MARGIN}}{note}" for number, note in enumerate(notes)]
    return "\n\n".join(part for part in parts if part)


def _heading(plan: Plan) -> str:
    verdict = "fits" if plan.fits else "is tight" if plan.share <= 1 else "does not fit"
    return (
        f"{count(plan.num_parameters)} parameters on {plan.layout.world_size:,} x {plan.gpu.name}: {verdict}, "
        f"{plan.peak / GIB:.1f} of {plan.gpu.memory / GIB:.0f} GiB, "
        f"about {seconds(plan.step.total)} a step. Nothing was started."
    )


def _model(plan: Plan) -> str:
    layout, config = plan.layout, plan.layout.config
    model, parallel, training = config.model, config.parallel, config.training
    groups = f" ({model.num_query_groups} groups)" if model.num_query_groups != model.num_attention_heads else ""
    sequence = " (sequence parallel)" if parallel.sequence_parallel and layout.tensor > 1 else ""
    virtual = f" x {layout.virtual} stages" if layout.virtual > 1 else ""
    switches = (
        next((name for name in ("bf16", "fp16", "fp64") if getattr(training, name)), "fp32"),
        f"recompute {training.recompute_granularity}" if training.recompute_granularity else "",
        "distributed optimizer" if parallel.use_distributed_optimizer else "",
    )
    micro_batches = "micro-batch" if layout.num_micro_batches == 1 else "micro-batches"
    half, full = plan.flops.half, plan.flops.full
    kind = "BERT, " if model.architecture == "bert" else ""
    texts = {
        "model": f"{kind}{model.num_layers} layers of width {model.hidden_size:,}, MLP {model.ffn_hidden_size:,} "
        f"{model.activation}, {model.num_attention_heads} heads{groups}, vocabulary {model.vocab_size:,}",
        "layout": f"tensor {layout.tensor}{sequence}, pipeline {layout.pipeline}{virtual}, data {layout.data}; "
        + ", ".join(filter(None, switches)),
        "batch": f"{training.global_batch_size:,} x {config.data.seq_length:,} = {plan.tokens:,} tokens a step; "
        f"{layout.num_micro_batches:,} {micro_batches} of {layout.sizes.batch} on each data rank",
        "FLOPs": f"{amount(half)} a token, {amount(half * plan.tokens)} a step"
        + (f", attention counted half ({amount(full)}, {amount(full * plan.tokens)} full)" if half < full else ""),
    }
    return "\n".join(_lines(title, text) for title, text in texts.items())


def _stages(plan: Plan) -> str:
    """Runs of equal stages in one line each."""
    runs: list[list[Stage]] = []
    for stage in plan.layout.stages:
        alike = runs and not stage.is_last and not runs[-1][0].is_first and len(runs[-1][0].layers) == len(stage.layers)
        runs[-1].append(stage) if alike else runs.append([stage])
    rows = [("stage", "ranks", "layers", "of a stage", "parameters of a process")]
    for run in runs:
        first, last = run[0], run[-1]
        ranks = sorted({stage.rank for stage in run})
        with_ends = ["embedding"] * first.is_first + ["output"] * last.is_last
        rows.append(
            (
                span(first.number, last.number),
                span(ranks[0], ranks[-1]),
                span(first.layers.start, last.layers.stop - 1) if last.layers.stop > first.layers.start else "-",
                f"{len(first.layers)}{''.join(f' + {end}' for end in with_ends)}",
                f"{first.parameters.total:,}",
            )
        )
    return _lines("stages", *table(rows, "<<<<>"))


def _memory(plan: Plan) -> str:
    totals = [sum(kinds.values()) for kinds in plan.memory]
    fullest = totals.index(max(totals))
    shown = sorted({0, fullest, len(totals) - 1} | (set(range(len(totals))) if len(totals) <= 4 else set()))
    rows = [("GiB of a process", *(f"rank {rank}" for rank in shown))]
    for kind in KINDS:
        values = [plan.memory[rank][kind] / GIB for rank in shown]
        if max(values) >= 0.005:
            rows.append((kind, *(f"{value:.2f}" for value in values)))
    rows.append(("sum", *(f"{totals[rank] / GIB:.2f}" for rank in shown)))
    rows.append(
        (f"of {plan.gpu.memory / GIB:.0f} GiB", *(f"{100 * totals[rank] / plan.gpu.memory:.0f}%" for rank in shown))
    )
    return _lines("memory", *table(rows, "<" + ">" * len(shown)))


def _schedule(plan: Plan) -> str:
    if plan.layout.pipeline == 1:
        return ""
    uneven = max(0.0, plan.step.bubble - plan.ideal_bubble)
    head = (
        f"{pipeline_schedule(plan.layout.config.parallel)}: bubble {100 * plan.step.bubble:.1f}%, of which "
        f"{100 * uneven:.1f} points from uneven stages and messages"
    )
    return _lines("schedule", head, *_picture(plan))


def _picture(plan: Plan) -> list[str]:
    layout = plan.layout
    if layout.pipeline > _MOST_DRAWN_RANKS:
        return [f"more than {_MOST_DRAWN_RANKS} ranks are not drawn"]
    number = layout.num_micro_batches
    most = max(layout.pipeline, 2 * layout.pipeline if layout.virtual == 1 else layout.pipeline)
    drawn = min(number, most)
    lowered = lower(schedule_of(layout.config.parallel, drawn))
    lines = text_grid(simulate(lowered, stage_costs(layout, plan.gpu)), width=WIDTH - _MARGIN).splitlines()[:-1]
    note = f"{drawn} of {number:,} micro-batches drawn; " if drawn < number else ""
    if len(lines) > _MOST_LINES_DRAWN:
        last = _MOST_LINES_DRAWN - 1
        lines = [lines[number * (layout.pipeline - 1) // last] for number in range(_MOST_LINES_DRAWN)]
        note = f"{_MOST_LINES_DRAWN} of {layout.pipeline} ranks and " + (note or f"all {drawn} micro-batches drawn; ")
    return [*lines, f"{note}F forward, B backward, with the micro-batch's number"]


def _time(plan: Plan) -> str:
    step, layout = plan.step, plan.layout
    parts = {
        "forward and backward": step.pipeline,
        "gradients": step.gradients,
        "parameters": step.parameters,
        "optimizer": step.optimizer,
    }
    peak = plan.gpu.flops if layout.sizes.element == 2 else plan.gpu.flops_32
    half, full = 100 * plan.flops_of_a_gpu / peak, plan.flops.full
    lines = [
        f"{seconds(step.total)}: " + " + ".join(f"{seconds(it)} {name}" for name, it in parts.items() if it),
        f"{plan.tokens / layout.world_size / step.total:,.0f} tokens/s and {plan.flops_of_a_gpu / 1e12:,.0f} TFLOP/s a "
        f"GPU: {half:.0f}% of peak"
        + (f", {half * full / plan.flops.half:.0f}% with full attention" if plan.flops.half < full else ""),
        "by stated rates and efficiencies of the GPU, not from a measurement",
    ]
    sent = [f"{axis} {it.messages:,.0f} ({_few_digits(it.sent / GIB)} GiB)" for axis, it in plan.traffic.items()]
    messages = _lines("messages", f"of a process in a step: {', '.join(sent)}") + "\n" if sent else ""
    return messages + _lines("time", *lines)


def _changes(plan: Plan, changes: Sequence[Change]) -> str:
    if not changes:
        return _lines(
            "to fit", f"no one or two changes bring it below {100 * SAFE_SHARE:.0f}%: take more or larger GPUs"
        )
    rows = [(" ".join(change.flags), *_outcome(change.plan)) for change in changes]
    return _lines("to fit", *table(rows, "<>>"))


def _others(plan: Plan, others: Sequence[Plan]) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "tensor", "pipeline", "virtual", "data", "micro-batch", "recompute", "memory", "step")
    ]
    for name, other in [("this", plan), *((str(number), other) for number, other in enumerate(others, start=1))]:
        layout = other.layout
        sizes = (layout.tensor, layout.pipeline, layout.virtual, layout.data, layout.sizes.batch)
        recompute = layout.config.training.recompute_granularity or "none"
        rows.append((name, *map(str, sizes), recompute, *_outcome(other)))
    return _lines("next best", *table(rows, "<>>>>><>>"))


def _outcome(plan: Plan) -> tuple[str, str]:
    return f"{100 * plan.share:.0f}%", seconds(plan.step.total)


def _lines(title: str, *lines: str) -> str:
    """Lines with a title in the margin of the first."""
    margins = [title, *[""] * (len(lines) - 1)]
    return "\n".join(f"{margin:<{_MARGIN}}{line}".rstrip() for margin, line in zip(margins, lines, strict=True))


def table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Rows with their columns aligned: `<` left, `>` right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(alignment))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True))
        for row in rows
    ]


def _few_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def span(first: int, last: int) -> str:
    """`3` or `3-7`."""
    return f"{first}" if first == last else f"{first}-{last}"


def count(number: float) -> str:
    """1,234 M as 1.23 B: three digits with M, B or T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def amount(flops: float) -> str:
    """Operations with G, T, P or E."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP"
    return f"{flops:.0f} FLOP"


def seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e3:.2g} ms"


def gib(size: float) -> str:
    """Bytes: GiB, or MiB where those are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"
