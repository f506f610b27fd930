"""Timing: runs a lowered schedule on a clock, with a cost per stage and message, and says what idles and why.

The model: a rank does its steps in order; compute takes its cost, posting takes no time. A message starts when its SEND
and its RECV are both posted and the channel is free, and takes `message` time units. Each directed edge (source rank,
destination rank) is one channel, in order, for activations and gradients alike.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megallm.schedule.action import (
    COMPUTE_KINDS,
    SEND_KINDS,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    parse_action,
)
from megallm.schedule.lowering import LoweredSchedule


class Event(NamedTuple):
    """One action on the clock. For a SEND the time is that of the transfer."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happened when: predicted by `simulate`, or measured by the executor.

    Attributes:
        name: for titles.
        events: (rank, action, start, end) in any order.
        unit: "s" for seconds, empty for the model's units (a rank's whole forward of one micro-batch is 1).
    """

    name: str
    events: tuple[Event, ...]
    unit: str = ""

    @property
    def num_ranks(self) -> int:
        return 1 + max((event.rank for event in self.events), default=-1)

    @property
    def compute(self) -> list[Event]:
        """The F, B, I and W events, by start."""
        return sorted(self._compute, key=lambda event: event.start)

    @cached_property
    def _compute(self) -> list[Event]:
        return [event for event in self.events if event.action.kind in COMPUTE_KINDS]

    @cached_property
    def start(self) -> float:
        """When the first compute starts. Kept: whoever draws asks for every event."""
        return min((event.start for event in self._compute), default=0.0)

    @property
    def makespan(self) -> float:
        """From the start of the first compute to the end of the last."""
        return max((event.end for event in self._compute), default=0.0) - self.start

    @property
    def rank_bubbles(self) -> tuple[float, ...]:
        """For each rank the fraction of the makespan in which it computes nothing."""
        busy = [0.0] * self.num_ranks
        for event in self.compute:
            busy[event.rank] += event.end - event.start
        makespan = self.makespan
        return tuple(1.0 - time / makespan if makespan else 0.0 for time in busy)

    @property
    def bubble(self) -> float:
        """The fraction of all ranks' time without compute: 1 - busy / (num_ranks * makespan)."""
        bubbles = self.rank_bubbles
        return sum(bubbles) / len(bubbles) if bubbles else 0.0

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """For each rank the most (stage, micro-batch) pairs at once whose forward has begun and backward not ended.

        Pairs that have no backward are not counted. Divide by the rank's chunks for full-rank micro-batches.
        """
        closing = {
            (event.action.stage, event.action.micro_batch)
            for event in self.events
            if event.action.kind in (Kind.B, Kind.W)
        }
        live, peak = [0] * self.num_ranks, [0] * self.num_ranks
        for rank, action, _, _ in self.compute:
            if action.kind is Kind.F and (action.stage, action.micro_batch) in closing:
                live[rank] += 1
                peak[rank] = max(peak[rank], live[rank])
            elif action.kind in (Kind.B, Kind.W):
                live[rank] -= 1
        return tuple(peak)

    @property
    def num_messages(self) -> int:
        return sum(event.action.kind in SEND_KINDS for event in self.events)

    def to_json(self) -> str:
        """One JSON object per line and event, so that the files of several ranks can simply be joined."""
        return "".join(
            json.dumps({"rank": rank, "action": str(action), "start": start, "end": end}) + "\n"
            for rank, action, start, end in self.events
        )

    @classmethod
    def from_json(cls, text: str, name: str = "measured", unit: str = "s") -> Timeline:
        """Reads what `to_json` wrote. Raises ValueError naming the line that is no event."""
        events = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                event = Event(
                    int(entry["rank"]), parse_action(entry["action"]), float(entry["start"]), float(entry["end"])
                )
            except KeyError as error:
                raise ValueError(f"line {number} is not an event of a timeline: it has no {error}") from None
            except (TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"line {number} is not an event of a timeline: {error}") from None
            if event.rank < 0 or not event.end >= event.start:
                raise ValueError(f"line {number}: rank {event.rank} from {event.start} to {event.end} is impossible")
            events.append(event)
        if not any(event.action.kind in COMPUTE_KINDS for event in events):
            raise ValueError("the timeline holds no compute action")
        return cls(name, tuple(events), unit)


@dataclass(frozen=True)
class Costs:
    """What compute and messages cost.

    Attributes:
        forward: time of one stage's forward of one micro-batch; one number for all stages, or one per stage.
            Default: 1 / (stages per rank), so that a rank's whole forward takes 1.
        backward: the same for the backward. Default: twice the default forward. I and W take half of it each.
        message: time of one message, from both ends posted to received.
    """

    forward: float | Sequence[float] | None = None
    backward: float | Sequence[float] | None = None
    message: float = 0.0

    def per_stage(self, schedule: Schedule) -> tuple[list[float], list[float]]:
        """Forward and backward time of each stage. Raises ValueError when a sequence has another length."""
        chunks = schedule.num_stages / schedule.num_ranks
        if self.message < 0:
            raise ValueError(f"a message cost is {self.message}; time is not negative")
        return (
            _per_stage("forward", 1 / chunks if self.forward is None else self.forward, schedule.num_stages),
            _per_stage("backward", 2 / chunks if self.backward is None else self.backward, schedule.num_stages),
        )


def _per_stage(what: str, cost: float | Sequence[float], num_stages: int) -> list[float]:
    costs = list(cost) if isinstance(cost, Sequence) else [cost] * num_stages
    if len(costs) != num_stages:
        raise ValueError(f"{len(costs)} {what} costs are given for {num_stages} stages; give one, or one per stage")
    if min(costs) < 0:
        raise ValueError(f"a {what} cost is {min(costs)}; time is not negative")
    return costs


def measured_costs(timeline: Timeline, num_stages: int, message: float = 0.0) -> Costs:
    """The mean forward and backward time of each stage in a measured timeline.

    A schedule simulated with them shows what the order itself costs: the rest of the measured step is communication and
    disturbance. Raises ValueError when a stage has no forward in the timeline.
    """
    times: dict[str, list[list[float]]] = {kind: [[] for _ in range(num_stages)] for kind in ("F", "B", "I", "W")}
    for event in timeline.compute:
        if event.action.stage >= num_stages:
            raise ValueError(f"the timeline has {event.action}, but the schedule has {num_stages} stages")
        times[event.action.kind.value][event.action.stage].append(event.end - event.start)
    for stage, forwards in enumerate(times["F"]):
        if not forwards:
            raise ValueError(f"the timeline has no forward of stage {stage}")
    mean = {kind: [sum(one) / len(one) if one else 0.0 for one in stages] for kind, stages in times.items()}
    backward = [sum(parts) for parts in zip(mean["B"], mean["I"], mean["W"], strict=True)]
    return Costs(forward=mean["F"], backward=backward, message=message)


def simulate(lowered: LoweredSchedule, costs: Costs | None = None) -> Timeline:
    """Runs the schedule on the clock. The result holds an event per compute action and per message.

    Raises:
        ScheduleError: the ranks wait for each other for ever; each one's step and action is named.
    """
    return Timeline(lowered.schedule.name, tuple(_Clock(lowered, costs or Costs()).run()))


class _Clock:
    """Advances each rank until a message that it needs is not through, and goes on with it when it is.

    A message is a number, the same at both its ends: activations come first, by the stage that receives them and the
    micro-batch, then gradients likewise. Both ends of a channel post its messages in one order, as `lower` makes and
    `verify` proves it; so a message of which both ends are posted is the next of its channel.
    """

    def __init__(self, lowered: LoweredSchedule, costs: Costs):
        schedule = lowered.schedule
        stages, number, num_ranks = range(schedule.num_stages), schedule.num_micro_batches, len(lowered.steps)
        self.steps = lowered.steps
        self.message_cost = costs.message
        forward, backward = costs.per_stage(schedule)
        half = [cost / 2 for cost in backward]
        self.costs = {Kind.F: forward, Kind.B: backward, Kind.I: half, Kind.W: half}
        # By kind and stage the message of micro-batch 0 that is sent, that is received, or that what computes needs.
        activations = [stage * number for stage in stages]
        gradients = [(len(stages) + stage) * number for stage in stages]
        self.first_messages = {
            **dict.fromkeys((Kind.F, Kind.RECV_F), activations),
            **dict.fromkeys((Kind.B, Kind.I, Kind.W, Kind.RECV_B), gradients),
            Kind.SEND_F: activations[1:],  # to the next stage
            Kind.SEND_B: [0, *gradients[:-1]],  # to the stage before, which the first has not
        }
        # When each message is through, None until then. What comes without one is there from the start.
        is_message = [*map(schedule.receives_activation, stages), *map(schedule.receives_gradient, stages)]
        self.through = [None if exists else 0.0 for exists in is_message for _ in range(number)]
        # The end of a message that was posted first: when, by which rank, and as what.
        self.posted: dict[int, tuple[float, int, Action]] = {}
        # From when on a channel is free, by the rank that sends and the one that receives.
        self.free: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.position = [0] * num_ranks
        self.now = [0.0] * num_ranks
        self.awake = deque(range(num_ranks))
        self.waiting: dict[int, int] = {}  # the rank that waits for a message
        self.events: list[Event] = []

    def run(self) -> Iterable[Event]:
        # Who waits for whom decides the times, not the order in which ranks are advanced here.
        while self.awake:
            self._advance(self.awake.popleft())
        stuck = [
            f"rank {rank}, step {index} ({self.steps[rank][index].action})"
            for rank, index in enumerate(self.position)
            if index < len(self.steps[rank])
        ]
        if stuck:
            raise ScheduleError(f"the ranks wait for each other for ever: {'; '.join(stuck)}")
        return self.events

    def _advance(self, rank: int) -> None:
        """Does the rank's steps until one has to wait for a message that is not through."""
        steps, now = self.steps[rank], self.now[rank]
        first_messages, through, posted, costs = self.first_messages, self.through, self.posted, self.costs
        for index in range(self.position[rank], len(steps)):
            action, _, awaits = steps[index]
            for kind, stage, micro_batch in awaits:
                assert micro_batch is not None, "a message has a micro-batch"
                message = first_messages[kind][stage] + micro_batch
                end = through[message]
                if end is None:
                    return self._wait(rank, index, now, message)
                now = max(now, end)
            kind, stage, micro_batch = action
            if micro_batch is None:  # GRAD_SYNC
                continue
            message = first_messages[kind][stage] + micro_batch
            if kind in costs:
                end = through[message]
                if end is None:
                    return self._wait(rank, index, now, message)
                start = max(now, end)
                now = start + costs[kind][stage]
                self.events.append(Event(rank, action, start, now))
            elif message in posted:
                self._transfer(message, (now, rank, action), posted.pop(message))
            else:
                posted[message] = now, rank, action
        self.position[rank] = len(steps)

    def _wait(self, rank: int, index: int, now: float, message: int) -> None:
        """Lets a rank sleep before a step, from `now` on, until a message is through."""
        self.position[rank], self.now[rank], self.waiting[message] = index, now, rank

    def _transfer(self, message: int, last: tuple[float, int, Action], first: tuple[float, int, Action]) -> None:
        """Times a message whose ends are both posted, and wakes who waits for it."""
        send, receive = (last, first) if last[2].kind in SEND_KINDS else (first, last)
        channel = send[1], receive[1]
        start = max(send[0], receive[0], self.free[channel])
        end = self.through[message] = self.free[channel] = start + self.message_cost
        self.events.append(Event(send[1], send[2], start, end))
        if message in self.waiting:
            self.awake.append(self.waiting.pop(message))
