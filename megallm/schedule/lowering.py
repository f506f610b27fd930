"""Lowering: from the compute order to everything a rank does, message by message.

All ranks' compute is walked in one global order. When an action finishes, its SEND is appended to the producer and the
RECV to the consumer at that same point of the walk. So both ends of every channel agree on the order of messages, and
each step waits only for things that stand earlier in the walk: there is no deadlock, whatever the channels are made of.

What a step waits for, and nothing else:
- F, B and I wait for the message that fills their slot, if they have one;
- any step waits for the sends named in its `awaits`;
- RECV posts and returns; SEND starts the transfer and returns. Sends that no step awaits are outstanding at the end.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megallm.schedule.action import Action, Kind, Schedule, ScheduleError

# To look up a member of an enumeration takes longer than to compare with it, and the walk does little else.
_F, _W, _SEND_F, _RECV_F, _SEND_B, _RECV_B = Kind.F, Kind.W, Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B
_CLOSING = (Kind.B, Kind.W)  # what ends a micro-batch on a stage

# Sends that may be under way at once per directed edge and kind. One would expose every message; more hold more memory.
MAX_OUTSTANDING_SENDS = 2

# Unread activations at which the walk holds back a stage without backward. Nothing else paces such a stage: it would
# run ahead, and the consumer would need a slot for every micro-batch of the step.
MAX_UNREAD_ACTIVATIONS = 2


class Step(NamedTuple):
    """One action of a lowered schedule.

    Attributes:
        action: what is done.
        slot: the receive buffer: the one that RECV_F or RECV_B fills, or that the F, B or I consuming the message
            reads. None where no message is received. Activation and gradient slots are numbered separately.
        awaits: sends of this rank that must have completed before the step starts. Afterwards they are forgotten.
    """

    action: Action
    slot: int | None = None
    awaits: tuple[Action, ...] = ()

    def __str__(self) -> str:
        slot = "" if self.slot is None else f"[{self.slot}]"
        return f"{self.action}{slot}" + "".join(f"<{send}" for send in self.awaits)


@dataclass(frozen=True)
class LoweredSchedule:
    """What the executor runs: for each rank its steps, and how many receive buffers they use.

    An activation slot is in use from its RECV_F until the micro-batch's backward on that stage is done (until its
    forward is done where there is no backward); a gradient slot from its RECV_B until the backward is done.
    """

    schedule: Schedule
    steps: tuple[tuple[Step, ...], ...]
    num_activation_slots: tuple[int, ...]
    num_gradient_slots: tuple[int, ...]

    def fingerprint(self) -> str:
        """A hash of schedule, messages, slots and waits in hexadecimal, equal on every machine."""
        lines = [self.schedule.fingerprint(), f"{self.num_activation_slots} {self.num_gradient_slots}"]
        lines += [" ".join(map(str, rank_steps)) for rank_steps in self.steps]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@lru_cache(maxsize=64)
def lower(schedule: Schedule) -> LoweredSchedule:
    """Adds messages, receive slots, waits for sends and GRAD_SYNC to a compute schedule.

    Raises:
        ScheduleError: the compute order waits for itself or for something that never runs.
    """
    ranks = _Walk(schedule).run()
    return LoweredSchedule(
        schedule,
        tuple(tuple(rank.steps) for rank in ranks),
        tuple(rank.activations.size for rank in ranks),
        tuple(rank.gradients.size for rank in ranks),
    )


class _Walk:
    """The global walk over compute: rounds in which every rank, in ascending order, does one action if it can."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.ranks = [_Rank(schedule, rank) for rank in range(schedule.num_ranks)]
        # Flags by stage and micro-batch, stage after stage.
        self.forwards_done = bytearray(schedule.num_stages * schedule.num_micro_batches)
        self.gradients_done = bytearray(schedule.num_stages * schedule.num_micro_batches)
        stages = range(schedule.num_stages)
        self.has_backward = [schedule.has_backward(stage) for stage in stages]
        # The rank that a stage's output, or the gradient of its input, is sent to.
        placement = schedule.placement
        self.reads_output = [placement[stage + 1] if schedule.sends_activation(stage) else None for stage in stages]
        self.reads_gradient = [placement[stage - 1] if schedule.sends_gradient(stage) else None for stage in stages]
        # Activations received and not yet consumed, by the stage that receives them.
        self.unread = [0] * schedule.num_stages

    def run(self) -> list[_Rank]:
        moved = True
        while moved:
            round_of_moves = [self._do_next(rank) for rank in self.ranks]
            moved = any(round_of_moves) or any(self._do_next(rank, hold_back=False) for rank in self.ranks)
        stuck = [f"rank {number} at {rank.pending[-1]}" for number, rank in enumerate(self.ranks) if rank.pending]
        if stuck:
            raise ScheduleError(f"the compute order cannot run: inputs never arrive for {', '.join(stuck)}")
        return self.ranks

    def _do_next(self, rank: _Rank, hold_back: bool = True) -> bool:
        """Appends the rank's next action, its SEND, and the RECV on the consumer; False if it has to wait."""
        if not rank.pending:
            return False
        action = rank.pending[-1]
        kind, stage, micro_batch = action
        assert micro_batch is not None, "compute has a micro-batch"
        place = stage * self.schedule.num_micro_batches + micro_batch
        if not self._has_inputs(kind, stage, place):
            return False
        if kind is _F:
            consumer = self.reads_output[stage]
            unpaced = consumer is not None and not self.has_backward[stage]
            if hold_back and unpaced and self.unread[stage + 1] >= MAX_UNREAD_ACTIVATIONS:
                return False
            rank.compute(action)
            self.forwards_done[place] = True
            self.unread[stage] -= 1
            if consumer is not None:
                rank.send(Action(_SEND_F, stage, micro_batch), consumer)
                self.ranks[consumer].receive(Action(_RECV_F, stage + 1, micro_batch))
                self.unread[stage + 1] += 1
            return True
        rank.compute(action)
        if kind is not _W:
            self.gradients_done[place] = True
            consumer = self.reads_gradient[stage]
            if consumer is not None:
                rank.send(Action(_SEND_B, stage, micro_batch), consumer)
                self.ranks[consumer].receive(Action(_RECV_B, stage - 1, micro_batch))
        return True

    def _has_inputs(self, kind: Kind, stage: int, place: int) -> bool:
        """`place` is that of stage and micro-batch among the flags."""
        number = self.schedule.num_micro_batches
        if kind is _F:
            return stage == 0 or bool(self.forwards_done[place - number])
        if kind is _W:
            return bool(self.gradients_done[place])
        if not self.forwards_done[place]:
            return False
        # What the stage before needs is the gradient of the input: of a whole backward, or of I alone.
        return stage + 1 == self.schedule.num_stages or bool(self.gradients_done[place + number])


class _SlotPool:
    """Numbers for buffers: the lowest free one is taken first."""

    def __init__(self) -> None:
        self.size = 0
        self.free: list[int] = []
        self.held: dict[tuple[int, int | None], int] = {}

    def take(self, key: tuple[int, int | None]) -> int:
        if not self.free:
            self.free.append(self.size)
            self.size += 1
        slot = self.held[key] = heapq.heappop(self.free)
        return slot

    def release(self, key: tuple[int, int | None]) -> None:
        slot = self.held.pop(key, None)
        if slot is not None:
            heapq.heappush(self.free, slot)


class _Rank:
    """One rank's steps, appended in its order: slots by liveness, waits, and GRAD_SYNC after a stage's last backward.

    Attributes:
        pending: compute that is not yet appended, the next one last.
        steps: what was appended.
        activations, gradients: the receive buffers.
    """

    def __init__(self, schedule: Schedule, rank: int):
        actions = schedule.actions[rank]
        self.pending = list(reversed(actions))
        self.steps: list[Step] = []
        self.activations, self.gradients = _SlotPool(), _SlotPool()
        self.has_backward = {stage: schedule.has_backward(stage) for stage in schedule.stages_of(rank)}
        self.backwards_left = Counter(action.stage for action in actions if action.kind in _CLOSING)
        # Sends under way, the oldest first, by kind and consumer.
        self.outstanding: defaultdict[tuple[Kind, int], deque[Action]] = defaultdict(deque)

    def compute(self, action: Action) -> None:
        """Appends the next of `pending`, and GRAD_SYNC where it closes its stage."""
        kind, stage, micro_batch = self.pending.pop()
        key = (stage, micro_batch)
        if kind is _F:
            self.steps.append(Step(action, self.activations.held.get(key)))
            if not self.has_backward[stage]:
                self.activations.release(key)
            return
        self.steps.append(Step(action, None if kind is _W else self.gradients.held.get(key)))
        if kind in _CLOSING:
            self.activations.release(key)
            self.gradients.release(key)
            self.backwards_left[stage] -= 1
            if not self.backwards_left[stage]:
                self.steps.append(Step(Action(Kind.GRAD_SYNC, stage)))

    def receive(self, action: Action) -> None:
        """Appends a RECV, which takes a slot."""
        pool = self.activations if action.kind is _RECV_F else self.gradients
        self.steps.append(Step(action, pool.take((action.stage, action.micro_batch))))

    def send(self, action: Action, consumer: int) -> None:
        """Appends a SEND. It waits for the oldest of its edge and kind, where one more would be too many.

        Later would be too late for the bound, and earlier could only wait longer. The awaited message stands earlier in
        the global walk than the send that awaits it, and so does its RECV: the wait closes no circle.
        """
        edge = self.outstanding[action.kind, consumer]
        awaits = (edge.popleft(),) if len(edge) == MAX_OUTSTANDING_SENDS else ()
        edge.append(action)
        self.steps.append(Step(action, None, awaits))
