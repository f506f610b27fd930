"""Timing: runs a lowered schedule on a clock, with a cost per stage and message, and says what idles and why.

The model: a rank does its steps in order; compute takes its cost, posting takes no time. A message starts when its SEND
and its RECV are both posted and the channel is free, and takes `message` time units. Each directed edge (source rank,
destination rank) is one channel, in order, for activations and gradients alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from megallm.schedule.action import (
    COMPUTE_KINDS,
    RECV_KINDS,
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
        return sorted((event for event in self.events if event.action.kind in COMPUTE_KINDS), key=lambda e: e.start)

    @cached_property
    def start(self) -> float:
        """When the first compute starts. Kept: whoever draws asks for every event."""
        return min((event.start for event in self.compute), default=0.0)

    @property
    def makespan(self) -> float:
        """From the start of the first compute to the end of the last."""
        return max((event.end for event in self.compute), default=0.0) - self.start

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
    """One directed edge: messages in order, each beginning when both ends are posted and the one before is through."""

    sends: list[tuple[float, int, Action]] = field(default_factory=list)
    receives: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)


class _Clock:
    def __init__(self, lowered: LoweredSchedule, costs: Costs):
        self.schedule = lowered.schedule
        self.steps = lowered.steps
        forward, backward = costs.per_stage(self.schedule)
        half = [cost / 2 for cost in backward]
        self.costs = {Kind.F: forward, Kind.B: backward, Kind.I: half, Kind.W: half}
        self.message = costs.message
        self.channels: dict[tuple[int, int], _Channel] = {}
        self.position = [0] * len(self.steps)
        self.now = [0.0] * len(self.steps)
        # Where a message is: its channel and its number in it, by the kind of this rank's end, stage and micro-batch.
        self.message_at: dict[tuple[Kind, int, int | None], tuple[_Channel, int]] = {}
        self.events: list[Event] = []

    def run(self) -> Iterable[Event]:
        # Who waits for whom decides the times, not the order in which ranks are advanced here.
        moved = [True]
        while any(moved):
            moved = [self._advance(rank) for rank in range(len(self.steps))]
        stuck = [
            f"rank {rank}, step {index} ({self.steps[rank][index].action})"
            for rank, index in enumerate(self.position)
            if index < len(self.steps[rank])
        ]
        if stuck:
            raise ScheduleError(f"the ranks wait for each other for ever: {'; '.join(stuck)}")
        return self.events

    def _advance(self, rank: int) -> bool:
        """Does the rank's steps until one has to wait for something that has not happened; whether it did any."""
        begin, steps = self.position[rank], self.steps[rank]
        for index in range(begin, len(steps)):
            action = steps[index].action
            ready = self.now[rank]
            for send in steps[index].awaits:
                end = self._message_end((send.kind, send.stage, send.micro_batch))
                if end is None:
                    break
                ready = max(ready, end)
            else:
                if action.kind in SEND_KINDS or action.kind in RECV_KINDS:
                    self.now[rank] = ready
                    self._post(rank, action)
                elif action.kind is not Kind.GRAD_SYNC and not self._compute(rank, action, ready):
                    break
                self.position[rank] += 1
                continue
            break
        return self.position[rank] > begin

    def _compute(self, rank: int, action: Action, ready: float) -> bool:
        schedule = self.schedule
        incoming = None
        if action.kind is Kind.F and schedule.receives_activation(action.stage):
            incoming = Kind.RECV_F
        elif action.kind in (Kind.B, Kind.I) and schedule.receives_gradient(action.stage):
            incoming = Kind.RECV_B
        if incoming is not None:
            arrival = self._message_end((incoming, action.stage, action.micro_batch))
            if arrival is None:
                return False
            ready = max(ready, arrival)
        end = ready + self.costs[action.kind][action.stage]
        self.events.append(Event(rank, action, ready, end))
        self.now[rank] = end
        return True

    def _message_end(self, key: tuple[Kind, int, int | None]) -> float | None:
        channel, number = self.message_at.get(key, (None, 0))
        return channel.ends[number] if channel is not None and number < len(channel.ends) else None

    def _post(self, rank: int, action: Action) -> None:
        step_to_peer = 1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else -1
        peer = self.schedule.placement[action.stage + step_to_peer]
        sending = action.kind in SEND_KINDS
        channel = self.channels.setdefault((rank, peer) if sending else (peer, rank), _Channel())
        number = len(channel.sends if sending else channel.receives)
        self.message_at[action.kind, action.stage, action.micro_batch] = (channel, number)
        if sending:
            channel.sends.append((self.now[rank], rank, action))
        else:
            channel.receives.append(self.now[rank])
        while (number := len(channel.ends)) < len(channel.sends) and number < len(channel.receives):
            posted, sender, send = channel.sends[number]
            start = max(posted, channel.receives[number], channel.ends[-1] if number else 0.0)
            channel.ends.append(start + self.message)
            self.events.append(Event(sender, send, start, start + self.message))
