#!/usr/bin/env python
"""Look at pipeline schedules without a GPU and without torch: print, verify, simulate, compare and draw them."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from megallm.config import fail
from megallm.config.report import while_somebody_reads, why_unreadable
from megallm.schedule import (
    BUILDERS,
    Costs,
    LoweredSchedule,
    Schedule,
    ScheduleError,
    Timeline,
    build_schedule,
    chrome_trace,
    lower,
    measured_costs,
    side_by_side_svg,
    simulate,
    summary,
    svg,
    text_grid,
    verify,
)

EPILOG = """\
An action is written stage, kind, micro-batch: 2F0 is the forward of micro-batch 0 on stage 2. The kinds are F, B (or I
and W when the backward of input and weights are apart), SEND_F, RECV_F, SEND_B, RECV_B and REDUCE_GRAD.
With -v stages per rank, stage s is on rank s %% p.

examples:
  %(prog)s print -p 4 -m 8                           the compute order of 1F1B on 4 ranks with 8 micro-batches
  %(prog)s print -p 4 -v 2 -m 8 --lowered            interleaved, with messages, buffer slots [n] and waits <SEND
  %(prog)s verify --from-csv mine.csv                is my own order correct and free of deadlock?
  %(prog)s simulate -p 8 -v 4 -m 32 --message-cost 0.1
  %(prog)s compare -p 8 -v 1 2 4 -m 8 16 32 --message-cost 0.05
  %(prog)s draw -p 4 -v 2 -m 8 --svg plan.svg
  %(prog)s draw -p 4 -v 2 -m 8 --measured timeline.*.jsonl --svg both.svg
"""


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one sentence."""

    def error(self, message: str) -> NoReturn:
        fail(self.prog, ValueError(message))


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 after a sentence on standard error."""
    try:
        with while_somebody_reads():
            options = _parser().parse_args(arguments)
            options.run(options)
    except (ValueError, ScheduleError, OSError) as error:
        print(f"{Path(sys.argv[0]).name} {options.command}: {_told(error)}", file=sys.stderr)
        return 2
    return 0


def _told(error: Exception) -> str:
    """An error as a sentence: of a file its name, and why it cannot be read or written."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read or written: {error.strerror}"
    return str(error)


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read: {why_unreadable(error)}") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    command = add("print", print_schedule, "list what each rank does, in order")
    _add_schedule(command)
    command.add_argument("--lowered", action="store_true", help="with messages, buffer slots and waits")
    command.add_argument(
        "--to-csv", metavar="FILE", help="write the compute order as torch reads it; - is the terminal"
    )

    command = add("verify", verify_schedule, "prove that a schedule is correct, bounded and free of deadlock")
    _add_schedule(command)
    command.add_argument("--max-in-flight", type=int, metavar="N", help="activations that a rank may hold at most")

    command = add("simulate", simulate_schedule, "time a schedule on a clock and say what idles")
    _add_schedule(command)
    _add_costs(command)

    command = add("compare", compare_schedules, "tabulate bubble, memory and messages of several schedules")
    command.add_argument("-p", "--num-ranks", type=int, default=4, metavar="P", help="ranks (default 4)")
    command.add_argument(
        "-v", "--num-virtual-stages", type=int, nargs="+", default=[1, 2, 4], metavar="V", help="default 1 2 4"
    )
    command.add_argument("-m", "--num-micro-batches", type=int, nargs="+", default=[8], metavar="M", help="default 8")
    command.add_argument("--schedule", nargs="+", choices=BUILDERS, default=list(BUILDERS), help="default: all")
    command.add_argument("--message-cost", type=float, default=0.0, metavar="T", help=_MESSAGE_HELP)

    command = add("draw", draw_schedule, "draw a schedule in the terminal, or into the files named")
    _add_schedule(command)
    _add_costs(command)
    command.add_argument(
        "--measured",
        nargs="+",
        metavar="FILE",
        help="JSON lines of a measured timeline, in seconds, drawn below the plan. The plan's costs are then "
        "the measured means of each stage, unless costs are given",
    )
    command.add_argument("--svg", metavar="FILE", help="picture for a page")
    command.add_argument(
        "--chrome-trace",
        metavar="FILE",
        help="for chrome://tracing or Perfetto (of the measurement where there is one)",
    )
    command.add_argument("--timeline", metavar="FILE", help="the planned timeline as JSON lines")
    command.add_argument("--width", type=int, metavar="N", help="columns in the terminal, or pixels of the picture")
    return parser


_MESSAGE_HELP = "time of one message where a rank's whole forward of a micro-batch takes 1 (default 0)"


def _add_schedule(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("schedule")
    group.add_argument("--schedule", choices=BUILDERS, help="default: 1f1b, or interleaved when V is above 1")
    group.add_argument("-p", "--num-ranks", type=int, metavar="P", help="ranks of the pipeline (default 4)")
    group.add_argument("-v", "--num-virtual-stages", type=int, metavar="V", help="stages per rank (default 1)")
    group.add_argument("-m", "--num-micro-batches", type=int, metavar="M", help="micro-batches of a step (default 8)")
    group.add_argument(
        "--micro-batch-group-size",
        type=int,
        metavar="N",
        help="interleaved: micro-batches that pass one chunk before the rank turns to the next (default P)",
    )
    group.add_argument("--first-trainable-stage", type=int, metavar="S", help="stages below S are frozen (default 0)")
    group.add_argument("--forward-only", action="store_true", default=None, help="evaluation: no backward")
    group.add_argument(
        "--from-csv",
        metavar="FILE",
        help="instead of all the above: a compute order, one row per rank, as this tool or torch writes it",
    )


def _add_costs(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("costs")
    numbers = "one number, or one per stage"
    group.add_argument("--forward-cost", type=float, nargs="+", metavar="T", help=f"{numbers} (default 1/V)")
    group.add_argument("--backward-cost", type=float, nargs="+", metavar="T", help=f"{numbers} (default 2/V)")
    group.add_argument("--message-cost", type=float, default=0.0, metavar="T", help=_MESSAGE_HELP)


def _schedule_of(options: argparse.Namespace) -> Schedule:
    names = (
        "schedule",
        "num_ranks",
        "num_virtual_stages",
        "num_micro_batches",
        "micro_batch_group_size",
        "first_trainable_stage",
        "forward_only",
    )
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.from_csv is not None:
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--from-csv holds the whole schedule; leave out {flags}")
        path = Path(options.from_csv)
        return Schedule.from_csv(_read(options.from_csv), name=path.stem)
    num_virtual_stages = given.pop("num_virtual_stages", 1)
    name = given.pop("schedule", "1f1b" if num_virtual_stages == 1 else "interleaved")
    num_ranks, num_micro_batches = given.pop("num_ranks", 4), given.pop("num_micro_batches", 8)
    return build_schedule(name, num_ranks, num_virtual_stages, num_micro_batches, **given)


def _verified(schedule: Schedule) -> LoweredSchedule:
    lowered = lower(schedule)
    verify(lowered)
    return lowered


def _costs_of(options: argparse.Namespace, measured: Timeline | None, schedule: Schedule) -> Costs:
    def cost(values: list[float] | None) -> float | list[float] | None:
        return values[0] if values is not None and len(values) == 1 else values

    forward, backward = cost(options.forward_cost), cost(options.backward_cost)
    if measured is not None and forward is None and backward is None:
        return measured_costs(measured, schedule.num_stages, options.message_cost)
    return Costs(forward, backward, options.message_cost)


def _title(schedule: Schedule) -> str:
    return (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_stages} stages, "
        f"{schedule.num_micro_batches} micro-batches"
    )


def print_schedule(options: argparse.Namespace) -> None:
    schedule = _schedule_of(options)
    if options.to_csv == "-":
        print(schedule.to_csv(), end="")
        return
    if options.to_csv is not None:
        Path(options.to_csv).write_text(schedule.to_csv())
    print(_title(schedule))
    rows = lower(schedule).steps if options.lowered else schedule.actions
    for rank, row in enumerate(rows):
        print(f"rank {rank}:", *row)


def verify_schedule(options: argparse.Namespace) -> None:
    schedule = _schedule_of(options)
    lowered = lower(schedule)
    verify(lowered, max_in_flight=options.max_in_flight)
    timeline = simulate(lowered)
    print(f"{_title(schedule)}: correct, and free of deadlock")
    print(f"  steps                  {sum(map(len, lowered.steps))}, of which {timeline.num_messages} send a message")
    print(f"  in flight, per rank    {' '.join(map(str, timeline.peak_in_flight))}")
    print(f"  activation slots       {' '.join(map(str, lowered.num_activation_slots))}")
    print(f"  gradient slots         {' '.join(map(str, lowered.num_gradient_slots))}")
    print(f"  fingerprint            {lowered.fingerprint()}")


def simulate_schedule(options: argparse.Namespace) -> None:
    schedule = _schedule_of(options)
    timeline = simulate(_verified(schedule), _costs_of(options, None, schedule))
    print(_title(schedule))
    print(summary(timeline))
    busy = [0.0] * timeline.num_ranks
    for event in timeline.compute:
        busy[event.rank] += event.end - event.start
    print("rank    busy    idle  bubble  in flight (micro-batches of a stage)")
    for rank, (time, bubble, peak) in enumerate(zip(busy, timeline.rank_bubbles, timeline.peak_in_flight, strict=True)):
        print(f"{rank:4} {time:7.4g} {timeline.makespan - time:7.4g} {100 * bubble:6.1f}%  {peak:9}")


def compare_schedules(options: argparse.Namespace) -> None:
    print(f"{options.num_ranks} ranks, a rank's forward 1 and backward 2, a message {options.message_cost:g}")
    print("in flight: worst rank, in micro-batches of the whole rank; slots: receive buffers of the worst rank")
    print("schedule       v     m  makespan  bubble  in flight  slots  messages")
    for num_micro_batches in options.num_micro_batches:
        for name in options.schedule:
            for num_virtual_stages in options.num_virtual_stages:
                # 1f1b is the schedule of one stage per rank, and interleaved that of more.
                if name == "gpipe" or (name == "1f1b") == (num_virtual_stages == 1):
                    schedule = build_schedule(name, options.num_ranks, num_virtual_stages, num_micro_batches)
                    _print_comparison(schedule, num_virtual_stages, Costs(message=options.message_cost))


def _print_comparison(schedule: Schedule, num_virtual_stages: int, costs: Costs) -> None:
    lowered = _verified(schedule)
    timeline = simulate(lowered, costs)
    slots = max(map(sum, zip(lowered.num_activation_slots, lowered.num_gradient_slots, strict=True)))
    print(
        f"{schedule.name:12} {num_virtual_stages:3} {schedule.num_micro_batches:5} {timeline.makespan:9.4g} "
        f"{100 * timeline.bubble:6.1f}% {max(timeline.peak_in_flight) / num_virtual_stages:10.4g} "
        f"{slots:6} {timeline.num_messages:9}"
    )


def draw_schedule(options: argparse.Namespace) -> None:
    schedule = _schedule_of(options)
    measured = None
    if options.measured:
        measured = Timeline.from_json("".join(_read(file) for file in options.measured))
    planned = simulate(_verified(schedule), _costs_of(options, measured, schedule))
    if measured is not None:
        # Costs that the user gave are taken as seconds too.
        planned = Timeline(f"{planned.name}, planned", planned.events, measured.unit)
    if options.svg:
        width = options.width or 960
        picture = svg(planned, width) if measured is None else side_by_side_svg(planned, measured, width)
        Path(options.svg).write_text(picture)
    if options.chrome_trace:
        Path(options.chrome_trace).write_text(chrome_trace(measured or planned))
    if options.timeline:
        Path(options.timeline).write_text(planned.to_json())
    if options.svg or options.chrome_trace or options.timeline:
        return
    terminal = sys.stdout.isatty()
    width = options.width or (shutil.get_terminal_size().columns if terminal else None)
    for timeline in (planned, measured):
        if timeline is not None:
            print(text_grid(timeline, width, color=terminal))


if __name__ == "__main__":
    sys.exit(main())
