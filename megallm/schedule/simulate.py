"""Timing: runs a lowered schedule on a clock, with a cost per stage and message, and says what idles and why.

The model: a rank does its steps in order; compute takes its cost, posting takes no time. A message starts when its SEND
and its RECV are both posted and the channel is free, and takes `message` time units. Each directed edge (source rank,
destination rank) is one channel, in order, for activations and gradients alike.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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

_GRAD_SYNC = Kind.GRAD_SYNC
_Message = tuple[Kind, int, int | None]  # an Action, or a plain tuple with the same, which is quicker made
_TO_NEXT_STAGE = frozenset({Kind.SEND_F, Kind.RECV_B})


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
        return sorted(self._compute(), key=lambda event: event.start)

    def _compute(self) -> Iterator[Event]:
        return (event for event in self.events if event.action.kind in COMPUTE_KINDS)

    @cached_property
    def start(self) -> float:
        """When the first compute starts. Kept: whoever draws asks for every event."""
        return min((event.start for event in self._compute()), default=0.0)

    @property
    def makespan(self) -> float:
        """From the start of the first compute to the end of the last."""
        return max((event.end for event in self._compute()), default=0.0) - self.start

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


@dataclass
class _Channel:
    """One directed edge: messages in order, each beginning when both ends are posted and the one before is through.

    Of the ends that wait for their other one, each with the time of its posting, all are sends or all are receives.
    """

    sends: deque[tuple[float, Action]] = field(default_factory=deque)
    receives: deque[tuple[float, Action]] = field(default_factory=deque)
    free: float = 0.0


class _Clock:
    def __init__(self, lowered: LoweredSchedule, costs: Costs):
        schedule = lowered.schedule
        self.steps = lowered.steps
        self.placement = schedule.placement
        self.message = costs.message
        forward, backward = costs.per_stage(schedule)
        half = [cost / 2 for cost in backward]
        stages = range(schedule.num_stages)
        activations = [Kind.RECV_F if schedule.receives_activation(stage) else None for stage in stages]
        gradients = [Kind.RECV_B if schedule.receives_gradient(stage) else None for stage in stages]
        # Of each kind of compute, by stage: the message that brings its input, if one does, and what it costs.
        self.compute: dict[Kind, list[tuple[Kind | None, float]]] = {
            Kind.F: list(zip(activations, forward, strict=True)),
            Kind.B: list(zip(gradients, backward, strict=True)),
            Kind.I: list(zip(gradients, half, strict=True)),
            Kind.W: [(None, cost) for cost in half],
        }
        self.channels: defaultdict[tuple[int, int], _Channel] = defaultdict(_Channel)
        self.position = [0] * len(self.steps)
        self.now = [0.0] * len(self.steps)
        self.awake = deque(range(len(self.steps)))
        # The rank that waits for a message, and when a message is through; by its SEND and by its RECV.
        self.waiting: dict[_Message, int] = {}
        self.ends: dict[_Message, float] = {}
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
        steps, ends, now = self.steps[rank], self.ends, self.now[rank]
        for index in range(self.position[rank], len(steps)):
            action = steps[index].action
            kind, stage, micro_batch = action
            awaited: tuple[_Message, ...] = steps[index].awaits
            cost = None
            if kind in self.compute:
                incoming, cost = self.compute[kind][stage]
                if incoming is not None:
                    awaited = (*awaited, (incoming, stage, micro_batch))
            ready = now
            for message in awaited:
                if message not in ends:
                    self.waiting[message] = rank
                    self.position[rank], self.now[rank] = index, now
                    return
                ready = max(ready, ends[message])
            now = ready
            if cost is not None:
                now = ready + cost
                self.events.append(Event(rank, action, ready, now))
            elif kind is not _GRAD_SYNC:
                self._post(rank, action, now)
        self.position[rank] = len(steps)

    def _post(self, rank: int, action: Action, now: float) -> None:
        """Posts one end of a message, and times the message where the other end waits already."""
        kind, stage, _ = action
        peer = self.placement[stage + 1 if kind in _TO_NEXT_STAGE else stage - 1]
        is_send = kind in SEND_KINDS
        channel = self.channels[(rank, peer) if is_send else (peer, rank)]
        own, others = (channel.sends, channel.receives) if is_send else (channel.receives, channel.sends)
        if not others:
            own.append((now, action))
            return
        posted, other = others.popleft()
        start = max(now, posted, channel.free)
        end = channel.free = start + self.message
        for one in (action, other):
            self.ends[one] = end
            if one in self.waiting:
                self.awake.append(self.waiting.pop(one))
        self.events.append(Event(rank, action, start, end) if is_send else Event(peer, other, start, end))
