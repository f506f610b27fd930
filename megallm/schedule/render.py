"""Pictures of a timeline, planned or measured: text for a terminal, SVG, and Chrome's trace format."""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Iterable
from html import escape
from statistics import median

from megallm.schedule.action import COMPUTE_KINDS, Action, Kind
from megallm.schedule.simulate import Event, Timeline

_KIND_NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}
_HUES = {Kind.F: 212, Kind.B: 28, Kind.I: 350, Kind.W: 150}  # degrees; chunks differ in lightness


def summary(timeline: Timeline) -> str:
    """Name, makespan, bubble and peak in one line."""
    peak = max(timeline.peak_in_flight, default=0)
    return (
        f"{timeline.name}: makespan {_amount(timeline.makespan)}{_unit(timeline)}, "
        f"bubble {100 * timeline.bubble:.1f}%, at most {peak} in flight"
    )


def _amount(value: float) -> str:
    return f"{value:.4g}"


def _unit(timeline: Timeline) -> str:
    return f" {timeline.unit}" if timeline.unit else ""


def _chunks(timeline: Timeline) -> dict[int, int]:
    """The chunk of each stage: its place among the stages of its rank."""
    of_rank: dict[int, set[int]] = {}
    for event in timeline.compute:
        of_rank.setdefault(event.rank, set()).add(event.action.stage)
    return {stage: chunk for stages in of_rank.values() for chunk, stage in enumerate(sorted(stages))}


# ---------------------------------------------------------------------------------------------------- terminal


def text_grid(timeline: Timeline, width: int | None = None, color: bool = False) -> str:
    """One row per rank, time to the right; F is filled with '-', backwards with '=', and idle time is blank.

    Args:
        width: columns at most. By default as many as the labels of the shortest actions need; where they do not fit,
            labels shrink from 5F12 over F12 to F.
        color: ANSI colours.
    """
    events = timeline.compute
    if not events:
        return summary(timeline)
    chunks = _chunks(timeline)
    margin = len(f"rank {timeline.num_ranks - 1} ")
    # Measured times have outliers; the median of each kind says how much room its labels have.
    durations: dict[Kind, list[float]] = {}
    for event in events:
        durations.setdefault(event.action.kind, []).append(event.end - event.start)
    typical = {kind: median(times) for kind, times in durations.items()}
    longest = max(len(_labels(event.action, chunks)[0]) for event in events)
    scale = (longest + 1) / (min(typical.values()) or timeline.makespan or 1.0)
    if width is not None:
        scale = min(scale, (width - margin) / (timeline.makespan or 1.0))
    rows = [[f"rank {rank}".ljust(margin)] for rank in range(timeline.num_ranks)]
    filled = [0] * timeline.num_ranks
    for event in events:
        begin, end = (round((time - timeline.start) * scale) for time in (event.start, event.end))
        begin = max(begin, filled[event.rank])
        if end > begin:
            label = _label(event.action, min(end - begin, typical[event.action.kind] * scale), chunks)
            cell = _cell(event.action, label, end - begin, chunks, color)
            rows[event.rank].append(" " * (begin - filled[event.rank]) + cell)
            filled[event.rank] = end
    return "\n".join([*map("".join, rows), summary(timeline)])


def _labels(action: Action, chunks: dict[int, int]) -> list[str]:
    short = [f"{action.kind.value}{action.micro_batch}", action.kind.value]
    return [str(action), *short] if any(chunks.values()) else short


def _label(action: Action, room: float, chunks: dict[int, int]) -> str:
    """The longest label that leaves one column to keep neighbours apart; a lone letter may do without."""
    labels = _labels(action, chunks)
    return next((label for label in labels if len(label) + 1 <= room + 1e-9), labels[-1])


def _cell(action: Action, label: str, width: int, chunks: dict[int, int], color: bool) -> str:
    text = label.ljust(width, "-" if action.kind is Kind.F else "=")
    if not color:
        return text
    red, green, blue = _rgb(action.kind, chunks[action.stage], max(chunks.values()) + 1)
    return f"\x1b[30;48;2;{red};{green};{blue}m{text}\x1b[0m"


# ---------------------------------------------------------------------------------------------------- SVG


def _rgb(kind: Kind, chunk: int, num_chunks: int) -> tuple[int, int, int]:
    """Darkest for the first chunk. All are light enough for black text and stand out on white and on black."""
    lightness = 0.58 + 0.24 * (chunk / (num_chunks - 1) if num_chunks > 1 else 0.35)
    parts = colorsys.hls_to_rgb(_HUES[kind] / 360, lightness, 0.72)
    red, green, blue = (round(255 * part) for part in parts)
    return red, green, blue


_MARGIN, _ROW, _GAP, _TITLE, _AXIS, _LEGEND = 56, 26, 4, 30, 30, 26


def svg(timeline: Timeline, width: int = 960) -> str:
    """A picture of `width` pixels, readable on light and dark pages, with the action's times under the pointer."""
    return _document([timeline], [1.0], width)


def side_by_side_svg(planned: Timeline, measured: Timeline, width: int = 960) -> str:
    """Plan above measurement on one time axis.

    Where the units differ, the plan is stretched until its compute takes as long as the measured one, so that what
    differs is waiting. A plan simulated with `measured_costs` is in the same unit and stays as it is.
    """
    stretch = 1.0
    if planned.unit != measured.unit:
        busy = sum(event.end - event.start for event in planned.compute)
        stretch = sum(event.end - event.start for event in measured.compute) / busy if busy else 1.0
    return _document([planned, measured], [stretch, 1.0], width)


def _document(timelines: list[Timeline], stretches: list[float], width: int) -> str:
    span = max(timeline.makespan * stretch for timeline, stretch in zip(timelines, stretches, strict=True)) or 1.0
    pixels = (width - _MARGIN - 12) / span
    body: list[str] = []
    top = 0.0
    for timeline, stretch in zip(timelines, stretches, strict=True):
        body += _panel(timeline, top, pixels * stretch, width)
        top += _TITLE + timeline.num_ranks * (_ROW + _GAP)
    body += _axis(top, span, pixels, timelines[-1].unit)
    top += _AXIS
    styles = {_style(event.action, _chunks(timeline)): event for timeline in timelines for event in timeline.compute}
    num_chunks = 1 + max((chunk for timeline in timelines for chunk in _chunks(timeline).values()), default=0)
    body += _legend(sorted(styles), top, num_chunks)
    height = round(top + _LEGEND)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"<title>{escape('; '.join(summary(timeline) for timeline in timelines))}</title>"
    )
    return "\n".join([head, _css(sorted(styles), num_chunks), *body, "</svg>\n"])


def _style(action: Action, chunks: dict[int, int]) -> tuple[str, int]:
    return action.kind.value, chunks[action.stage]


def _css(styles: list[tuple[str, int]], num_chunks: int) -> str:
    lines = [
        "<style>",
        "text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #24292f; }",
        ".title { font-weight: 600; } .mid { text-anchor: middle; }",
        ".row { fill: #eef1f4; } line { stroke: #8c959f; }",
        "@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .row { fill: #262c34; } }",
        "text.on { font-size: 11px; fill: #111; text-anchor: middle; }",
    ]
    for kind, chunk in styles:
        lines.append(f".{kind}{chunk} {{ fill: rgb{_rgb(Kind(kind), chunk, num_chunks)}; }}")
    return "\n".join([*lines, "</style>"])


def _panel(timeline: Timeline, top: float, pixels: float, width: int) -> list[str]:
    parts = [f'<text class="title" x="8" y="{top + 19:g}">{escape(summary(timeline))}</text>']
    chunks = _chunks(timeline)
    first_row = top + _TITLE
    for rank in range(timeline.num_ranks):
        y = first_row + rank * (_ROW + _GAP)
        parts.append(f'<text x="8" y="{y + 17:g}">rank {rank}</text>')
        parts.append(f'<rect class="row" x="{_MARGIN}" y="{y:g}" width="{width - _MARGIN - 12}" height="{_ROW}"/>')
    parts += [_box(event, timeline, first_row, pixels, chunks) for event in timeline.compute]
    return parts


def _box(event: Event, timeline: Timeline, first_row: float, pixels: float, chunks: dict[int, int]) -> str:
    x = _MARGIN + (event.start - timeline.start) * pixels
    y = first_row + event.rank * (_ROW + _GAP)
    box_width = (event.end - event.start) * pixels
    kind, chunk = _style(event.action, chunks)
    label = str(event.action.micro_batch)
    times = f"{_amount(event.start - timeline.start)} to {_amount(event.end - timeline.start)}{_unit(timeline)}"
    gap = min(1.0, box_width / 8)  # neighbours stay apart, also without a stroke
    box = (
        f'<rect class="{kind}{chunk}" x="{x:.2f}" y="{y:g}" width="{box_width - gap:.2f}" height="{_ROW}" rx="2">'
        f"<title>{event.action} on rank {event.rank}, {times}</title></rect>"
    )
    if box_width < 7 * len(label) + 1:
        return box
    return box + f'<text class="on" x="{x + (box_width - gap) / 2:.2f}" y="{y + 17:g}">{label}</text>'


def _axis(top: float, span: float, pixels: float, unit: str) -> list[str]:
    parts = []
    step = _round_step(span / 10)
    for index in range(int(span / step + 1e-9) + 1):
        x = _MARGIN + index * step * pixels
        label = _amount(index * step) + (f" {unit}" if unit and index == 0 else "")
        parts.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{top:g}" y2="{top + 5:g}"/>')
        parts.append(f'<text class="mid" x="{x:.2f}" y="{top + 19:g}">{label}</text>')
    return parts


def _round_step(wanted: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is at least `wanted`."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))


def _legend(styles: Iterable[tuple[str, int]], top: float, num_chunks: int) -> list[str]:
    parts, x = [], float(_MARGIN)
    for kind, chunk in sorted(styles, key=lambda style: ("FBIW".index(style[0]), style[1])):
        label = _KIND_NAMES[Kind(kind)] + (f", chunk {chunk}" if num_chunks > 1 else "")
        parts.append(f'<rect class="{kind}{chunk}" x="{x:g}" y="{top:g}" width="14" height="14" rx="2"/>')
        parts.append(f'<text x="{x + 20:g}" y="{top + 12:g}">{label}</text>')
        x += 36 + 6.6 * len(label)
    return parts


# ---------------------------------------------------------------------------------------------------- Chrome trace


def chrome_trace(timeline: Timeline) -> str:
    """JSON for chrome://tracing or Perfetto: a thread per rank for compute, and another for what it sends.

    Times without unit are drawn as milliseconds.
    """
    microseconds = 1e6 if timeline.unit == "s" else 1e3
    start = min((event.start for event in timeline.events), default=0.0)
    records: list[dict[str, object]] = []
    for process, name in enumerate((f"{timeline.name}: compute", f"{timeline.name}: other")):
        records.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}})
        for rank in range(timeline.num_ranks):
            args = {"name": f"rank {rank}"}
            records.append({"name": "thread_name", "ph": "M", "pid": process, "tid": rank, "args": args})
    for event in timeline.events:
        action = event.action
        records.append(
            {
                "name": str(action),
                "cat": action.kind.value,
                "ph": "X",
                "pid": 0 if action.kind in COMPUTE_KINDS else 1,
                "tid": event.rank,
                "ts": (event.start - start) * microseconds,
                "dur": (event.end - event.start) * microseconds,
                "args": {"stage": action.stage, "micro_batch": action.micro_batch},
            }
        )
    return json.dumps({"traceEvents": records, "displayTimeUnit": "ms"})
