"""Pipeline schedules as data: built, lowered to messages, proven, timed and drawn. Needs nothing but Python."""

from megallm.schedule.action import Action, Kind, Schedule, ScheduleError, parse_action
from megallm.schedule.builders import BUILDERS, build_schedule
from megallm.schedule.lowering import LoweredSchedule, Step, lower
from megallm.schedule.render import chrome_trace, side_by_side_svg, summary, svg, text_grid
from megallm.schedule.simulate import Costs, Event, Timeline, measured_costs, simulate
from megallm.schedule.verify import verify

__all__ = [
    "BUILDERS",
    "Action",
    "Costs",
    "Event",
    "Kind",
    "LoweredSchedule",
    "Schedule",
    "ScheduleError",
    "Step",
    "Timeline",
    "build_schedule",
    "chrome_trace",
    "lower",
    "measured_costs",
    "parse_action",
    "side_by_side_svg",
    "simulate",
    "summary",
    "svg",
    "text_grid",
    "verify",
]
