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
from collections import Counter, deque
from dataclasses import dataclass
from functools import lru_cache

from megallm.schedule.action import SEND_KINDS, Action, Kind, Schedule, ScheduleError

# Sends that may be under way at once per directed edge and kind. One would expose every message; more hold more memory.
MAX_OUTSTANDING_SENDS = 2

# Unread activations at which the walk holds back a stage without backward. Nothing else paces such a stage: it would
# run ahead, and the consumer would need a slot for every micro-batch of the step.
MAX_UNREAD_ACTIVATIONS = 2


@dataclass(frozen=True, slots=True)
class Step:
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
    rank_actions = _Walk(schedule).run()
    steps, activation_slots, gradient_slots = [], [], []
    for actions in rank_actions:
        actions = _with_gradient_sync(actions)
        slots, num_activation_slots, num_gradient_slots = _assign_slots(schedule, actions)
        awaits = _place_waits(schedule, actions)
        steps.append(tuple(map(Step, actions, slots, awaits)))
        activation_slots.append(num_activation_slots)
        gradient_slots.append(num_gradient_slots)
    return LoweredSchedule(schedule, tuple(steps), tuple(activation_slots), tuple(gradient_slots))


class _Walk:
    """The global walk over compute: rounds in which every rank, in ascending order, does one action if it can."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.pending = [deque(actions) for actions in schedule.actions]
        self.walked: list[list[Action]] = [[] for _ in schedule.actions]
        self.finished: set[tuple[Kind, int, int | None]] = set()
        # Activations received and not yet consumed, by the stage that receives them.
        self.unread: Counter[int] = Counter()

    def run(self) -> list[list[Action]]:
        ranks = range(self.schedule.num_ranks)
        moved = True
        while moved:
            round_of_moves = [self._do_next(rank) for rank in ranks]
            moved = any(round_of_moves) or any(self._do_next(rank, hold_back=False) for rank in ranks)
        stuck = [f"rank {rank} at {actions[0]}" for rank, actions in enumerate(self.pending) if actions]
        if stuck:
            raise ScheduleError(f"the compute order cannot run: inputs never arrive for {', '.join(stuck)}")
        return self.walked

    def _do_next(self, rank: int, hold_back: bool = True) -> bool:
        """Appends the rank's next action, its SEND, and the RECV on the consumer; False if it has to wait."""
        if not self.pending[rank] or not self._has_inputs(self.pending[rank][0]):
            return False
        action = self.pending[rank][0]
        receive = self._receive_of(action)
        unpaced = receive is not None and not self.schedule.has_backward(action.stage)
        if hold_back and unpaced and self.unread[action.stage + 1] >= MAX_UNREAD_ACTIVATIONS:
            return False
        self.pending[rank].popleft()
        self.walked[rank].append(action)
        self.finished.add((Kind.I if action.kind is Kind.B else action.kind, action.stage, action.micro_batch))
        if action.kind is Kind.F:
            self.unread[action.stage] -= 1
        if receive is not None:
            send_kind = Kind.SEND_F if receive.kind is Kind.RECV_F else Kind.SEND_B
            self.walked[rank].append(Action(send_kind, action.stage, action.micro_batch))
            self.walked[self.schedule.placement[receive.stage]].append(receive)
            self.unread[receive.stage] += receive.kind is Kind.RECV_F
        return True

    def _has_inputs(self, action: Action) -> bool:
        stage, micro_batch, finished = action.stage, action.micro_batch, self.finished
        if action.kind is Kind.F:
            return stage == 0 or (Kind.F, stage - 1, micro_batch) in finished
        if action.kind is Kind.W:
            return (Kind.I, stage, micro_batch) in finished
        if (Kind.F, stage, micro_batch) not in finished:
            return False
        # I stands for B too: what the stage before needs is the gradient of the input.
        return stage + 1 == self.schedule.num_stages or (Kind.I, stage + 1, micro_batch) in finished

    def _receive_of(self, action: Action) -> Action | None:
        """The RECV on another rank that the result of `action` goes to."""
        if action.kind is Kind.F and self.schedule.sends_activation(action.stage):
            return Action(Kind.RECV_F, action.stage + 1, action.micro_batch)
        if action.kind in (Kind.B, Kind.I) and self.schedule.sends_gradient(action.stage):
            return Action(Kind.RECV_B, action.stage - 1, action.micro_batch)
        return None


def _with_gradient_sync(actions: list[Action]) -> list[Action]:
    """Inserts GRAD_SYNC directly after the last B or W of each stage."""
    last = {action.stage: index for index, action in enumerate(actions) if action.kind in (Kind.B, Kind.W)}
    result = []
    for index, action in enumerate(actions):
        result.append(action)
        if last.get(action.stage) == index:
            result.append(Action(Kind.GRAD_SYNC, action.stage))
    return result


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
        self.held[key] = heapq.heappop(self.free)
        return self.held[key]

    def release(self, key: tuple[int, int | None]) -> None:
        slot = self.held.pop(key, None)
        if slot is not None:
            heapq.heappush(self.free, slot)


def _assign_slots(schedule: Schedule, actions: list[Action]) -> tuple[list[int | None], int, int]:
    """The slot of each action and the numbers of activation and gradient slots, by liveness along the rank's order."""
    activations, gradients = _SlotPool(), _SlotPool()
    slots: list[int | None] = []
    for action in actions:
        key = (action.stage, action.micro_batch)
        slot = None
        if action.kind is Kind.RECV_F:
            slot = activations.take(key)
        elif action.kind is Kind.RECV_B:
            slot = gradients.take(key)
        elif action.kind is Kind.F:
            slot = activations.held.get(key)
            if not schedule.has_backward(action.stage):
                activations.release(key)
        elif action.kind in (Kind.B, Kind.I):
            slot = gradients.held.get(key)
        if action.kind in (Kind.B, Kind.W):
            activations.release(key)
            gradients.release(key)
        slots.append(slot)
    return slots, activations.size, gradients.size


def _place_waits(schedule: Schedule, actions: list[Action]) -> list[tuple[Action, ...]]:
    """For each action the sends to wait for: the oldest of its edge and kind, when a further one would be too many.

    Later would be too late for the bound, and earlier could only wait longer. The awaited message stands earlier in the
    global walk than the send that awaits it, and so does its RECV: the wait closes no circle.
    """
    outstanding: dict[tuple[Kind, int], deque[Action]] = {}
    awaits: list[tuple[Action, ...]] = []
    for action in actions:
        if action.kind not in SEND_KINDS:
            awaits.append(())
            continue
        consumer = action.stage + 1 if action.kind is Kind.SEND_F else action.stage - 1
        edge = outstanding.setdefault((action.kind, schedule.placement[consumer]), deque())
        awaits.append((edge.popleft(),) if len(edge) == MAX_OUTSTANDING_SENDS else ())
        edge.append(action)
    return awaits
