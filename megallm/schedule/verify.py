"""Proof that a lowered schedule computes the right thing and ends, before anything runs.

One walk along each rank's steps checks what that rank can see: every action once and after what it needs on this rank,
slots, waits, the gradient sync, the activation budget. What is left lies between ranks: that both ends of a channel
agree on the order of messages, and that no rank waits for ever. That the input of a compute action is the right one
follows: it is in the slot that the right RECV filled, which pairs with the right SEND, which follows the right compute.
"""

from __future__ import annotations

from collections.abc import Sequence

from megallm.schedule.action import COMPUTE_KINDS, RECV_KINDS, SEND_KINDS, Action, Kind, Schedule, ScheduleError
from megallm.schedule.lowering import MAX_OUTSTANDING_SENDS, LoweredSchedule, Step
from megallm.schedule.simulate import Costs, simulate


def verify(lowered: LoweredSchedule, *, max_in_flight: int | Sequence[int] | None = None) -> None:
    """Raises ScheduleError, naming rank, step and action, unless the schedule is correct, bounded and free of deadlock.

    - Each F, and each B or I with W, happens exactly once, after what it depends on.
    - Each SEND has its RECV, in the same order at both ends of the channel (source rank, destination rank) that carries
      activations and gradients; and none is superfluous.
    - Under rendezvous (a send completes when its receive is posted and the messages before it on the channel are
      through) every rank gets to its end.
    - A slot is not refilled while its content is needed, and its reader reads the message meant for it.
    - At most two sends per directed edge and kind are outstanding, and waits name sends that are.
    - GRAD_SYNC comes once per trainable stage, directly after its last backward.
    - The (stage, micro-batch) pairs between forward and backward never exceed the budget.

    Args:
        max_in_flight: the budget, per rank or for all; by default what the builder declared, if it did.
    """
    schedule = lowered.schedule
    for what in ("steps", "num_activation_slots", "num_gradient_slots"):
        if len(getattr(lowered, what)) != schedule.num_ranks:
            raise ScheduleError(f"{what} has {len(getattr(lowered, what))} entries for {schedule.num_ranks} ranks")
    budget = schedule.max_in_flight if max_in_flight is None else max_in_flight
    if isinstance(budget, int):
        budget = (budget,) * schedule.num_ranks
    if budget is not None and len(budget) != schedule.num_ranks:
        raise ScheduleError(f"max_in_flight has {len(budget)} entries for {schedule.num_ranks} ranks")
    for rank in range(schedule.num_ranks):
        _RankChecker(lowered, rank, None if budget is None else budget[rank]).run()
    _check_channel_order(lowered)
    simulate(lowered, Costs(forward=0.0, backward=0.0))  # raises where the ranks wait for each other


class _RankChecker:
    """Walks along one rank's steps and remembers what has happened."""

    def __init__(self, lowered: LoweredSchedule, rank: int, budget: int | None):
        self.schedule: Schedule = lowered.schedule
        self.rank = rank
        self.budget = budget
        self.steps = lowered.steps[rank]
        self.index = 0
        self.exists = {stage: _existing_kinds(self.schedule, stage) for stage in self.schedule.stages_of(rank)}
        self.done: set[tuple[Kind, int, int | None]] = set()
        self.remaining_backwards = dict.fromkeys(self.exists, self.schedule.num_micro_batches)
        self.sync_due: int | None = None
        self.in_flight = 0
        self.outstanding: dict[tuple[Kind, int], list[Action]] = {}
        # Per kind of message: the content of each slot, and the slot of each content.
        num_slots = {Kind.RECV_F: lowered.num_activation_slots[rank], Kind.RECV_B: lowered.num_gradient_slots[rank]}
        self.content: dict[Kind, list[tuple[int, int | None] | None]] = {
            kind: [None] * size for kind, size in num_slots.items()
        }
        self.slot_of: dict[Kind, dict[tuple[int, int | None], int]] = {kind: {} for kind in num_slots}

    def fail(self, sentence: str) -> ScheduleError:
        if self.index < len(self.steps):
            return ScheduleError(f"rank {self.rank}, step {self.index} ({self.steps[self.index].action}): {sentence}")
        return ScheduleError(f"rank {self.rank}, after the last step: {sentence}")

    def run(self) -> None:
        for index, step in enumerate(self.steps):
            self.index = index
            action = step.action
            self.check_action(action)
            self.check_waits(step)
            if action.kind in COMPUTE_KINDS:
                self.check_compute(step)
            elif action.kind in RECV_KINDS:
                self.check_receive(step)
            elif action.kind in SEND_KINDS:
                self.check_send(step)
            self.done.add((action.kind, action.stage, action.micro_batch))
        self.index = len(self.steps)
        if self.sync_due is not None:
            raise self.fail(f"the gradient sync of stage {self.sync_due} is missing")
        self.check_complete()
        order = tuple(step.action for step in self.steps if step.action.kind in COMPUTE_KINDS)
        if order != self.schedule.actions[self.rank]:
            raise self.fail("the steps compute in another order than the schedule")

    def check_action(self, action: Action) -> None:
        """The action exists in this layout, is on this rank and new; a gradient sync comes exactly when it is due."""
        kind, stage, schedule = action.kind, action.stage, self.schedule
        if stage not in self.exists:
            raise self.fail("the stage is not on this rank")
        if (kind, stage, action.micro_batch) in self.done:
            raise self.fail("it has happened already")
        if kind is Kind.GRAD_SYNC:
            if self.sync_due != stage:
                raise self.fail("the step before it is not the last backward of its stage")
            if action.micro_batch is not None:
                raise self.fail("a gradient sync has no micro-batch")
            self.sync_due = None
            return
        if self.sync_due is not None:
            raise self.fail(f"the gradient sync of stage {self.sync_due} must come directly after its last backward")
        if action.micro_batch is None or not 0 <= action.micro_batch < schedule.num_micro_batches:
            raise self.fail("there is no such micro-batch")
        if not self.exists[stage].get(kind, schedule.has_backward(stage)):
            raise self.fail("this stage has no such action in this layout")

    def check_waits(self, step: Step) -> None:
        for send in step.awaits:
            if send.kind not in SEND_KINDS:
                raise self.fail(f"it awaits {send}, which is no send")
            edge = self.outstanding.get((send.kind, self.peer(send)), [])
            if send not in edge:
                raise self.fail(f"it awaits {send}, which is not outstanding")
            edge.remove(send)

    def check_send(self, step: Step) -> None:
        action = step.action
        produced = self.happened(Kind.F, action) if action.kind is Kind.SEND_F else self.has_input_gradient(action)
        if not produced:
            raise self.fail("what it sends is not computed yet")
        if step.slot is not None:
            raise self.fail("a send has no slot")
        edge = self.outstanding.setdefault((action.kind, self.peer(action)), [])
        edge.append(action)
        if len(edge) > MAX_OUTSTANDING_SENDS:
            raise self.fail(f"{len(edge)} sends of this kind are outstanding to rank {self.peer(action)}")

    def check_receive(self, step: Step) -> None:
        action, content = step.action, self.content[step.action.kind]
        if step.slot is None or not 0 <= step.slot < len(content):
            raise self.fail(f"slot {step.slot} is not one of the rank's {len(content)}")
        holder = content[step.slot]
        if holder is not None:
            raise self.fail(f"slot {step.slot} still holds stage {holder[0]}, micro-batch {holder[1]}")
        key = (action.stage, action.micro_batch)
        content[step.slot] = key
        self.slot_of[action.kind][key] = step.slot

    def check_compute(self, step: Step) -> None:
        action, schedule = step.action, self.schedule
        kind, stage, micro_batch = action.kind, action.stage, action.micro_batch
        if kind is Kind.F:
            if stage > 0 and not schedule.crosses_ranks(stage) and (Kind.F, stage - 1, micro_batch) not in self.done:
                raise self.fail(f"stage {stage - 1} on the same rank has not run yet")
            self.check_slot(step, Kind.RECV_F, schedule.receives_activation(stage))
            self.enter_flight(stage)
        elif not self.happened(Kind.F, action):
            raise self.fail("its forward has not run yet")
        elif kind is Kind.W:
            if not self.happened(Kind.I, action):
                raise self.fail("the backward of its input has not run yet")
            self.check_slot(step, Kind.RECV_B, False)
        else:
            if self.has_input_gradient(action):
                raise self.fail("the gradient of its input is computed already")
            after = Action(Kind.I, stage + 1, micro_batch)
            is_local = stage + 1 < schedule.num_stages and not schedule.crosses_ranks(stage + 1)
            if is_local and not self.has_input_gradient(after):
                raise self.fail(f"the backward of stage {stage + 1} on the same rank has not run yet")
            self.check_slot(step, Kind.RECV_B, schedule.receives_gradient(stage))
        if not schedule.has_backward(stage):
            self.free(Kind.RECV_F, action)
        elif kind in (Kind.B, Kind.W):
            self.end_flight(action)

    def enter_flight(self, stage: int) -> None:
        self.in_flight += self.schedule.has_backward(stage)
        if self.budget is not None and self.in_flight > self.budget:
            raise self.fail(f"{self.in_flight} activations are in flight, {self.budget} are allowed")

    def end_flight(self, action: Action) -> None:
        self.in_flight -= 1
        self.free(Kind.RECV_F, action)
        self.free(Kind.RECV_B, action)
        self.remaining_backwards[action.stage] -= 1
        if self.remaining_backwards[action.stage] == 0:
            self.sync_due = action.stage

    def check_slot(self, step: Step, receive: Kind, expected: bool) -> None:
        """The step reads the slot that its message fills; or none, where there is no message."""
        slot = self.slot_of[receive].get((step.action.stage, step.action.micro_batch))
        if expected and slot is None:
            raise self.fail("the receive of its input is not posted yet")
        if step.slot != (slot if expected else None):
            raise self.fail(f"it reads slot {step.slot}, but its input is in slot {slot if expected else None}")

    def free(self, receive: Kind, action: Action) -> None:
        slot = self.slot_of[receive].pop((action.stage, action.micro_batch), None)
        if slot is not None:
            self.content[receive][slot] = None

    def check_complete(self) -> None:
        schedule = self.schedule
        for stage in self.exists:
            for micro_batch in range(schedule.num_micro_batches):
                for kind, exists in self.exists[stage].items():
                    if exists and (kind, stage, micro_batch) not in self.done:
                        raise self.fail(f"{Action(kind, stage, micro_batch)} is missing")
                whole, weight = ((kind, stage, micro_batch) in self.done for kind in (Kind.B, Kind.W))
                if schedule.has_backward(stage) and not (whole or weight):
                    raise self.fail(f"the backward of stage {stage}, micro-batch {micro_batch} is missing")

    def happened(self, kind: Kind, action: Action) -> bool:
        return (kind, action.stage, action.micro_batch) in self.done

    def has_input_gradient(self, action: Action) -> bool:
        return self.happened(Kind.B, action) or self.happened(Kind.I, action)

    def peer(self, send: Action) -> int:
        return self.schedule.placement[send.stage + (1 if send.kind is Kind.SEND_F else -1)]


def _existing_kinds(schedule: Schedule, stage: int) -> dict[Kind, bool]:
    """Which of the kinds that can happen in one way only must happen on `stage`; a backward can be B, or I and W."""
    return {
        Kind.F: True,
        Kind.SEND_F: schedule.sends_activation(stage),
        Kind.RECV_F: schedule.receives_activation(stage),
        Kind.SEND_B: schedule.sends_gradient(stage),
        Kind.RECV_B: schedule.receives_gradient(stage),
    }


def _check_channel_order(lowered: LoweredSchedule) -> None:
    """Both ends of each directed edge list the same messages in the same order."""
    placement = lowered.schedule.placement
    # For each edge: (step, SEND, the RECV that belongs to it) and (step, RECV).
    sent: dict[tuple[int, int], list[tuple[int, Action, Action]]] = {}
    received: dict[tuple[int, int], list[tuple[int, Action]]] = {}
    for rank, steps in enumerate(lowered.steps):
        for index, step in enumerate(steps):
            action = step.action
            if action.kind not in SEND_KINDS and action.kind not in RECV_KINDS:
                continue
            peer_stage = action.stage + (1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else -1)
            peer = placement[peer_stage]
            if action.kind in RECV_KINDS:
                received.setdefault((peer, rank), []).append((index, action))
            else:
                receive_kind = Kind.RECV_F if action.kind is Kind.SEND_F else Kind.RECV_B
                message = (index, action, Action(receive_kind, peer_stage, action.micro_batch))
                sent.setdefault((rank, peer), []).append(message)
    for edge in sent.keys() | received.keys():
        sends, receives = sent.get(edge, []), received.get(edge, [])
        assert len(sends) == len(receives), "each rank has all its messages, so both ends have equally many"
        for (send_index, send, wanted), (receive_index, receive) in zip(sends, receives, strict=True):
            if receive != wanted:
                raise ScheduleError(
                    f"rank {edge[0]}, step {send_index} ({send}) meets rank {edge[1]}, step {receive_index} "
                    f"({receive}): the ends of the channel disagree on the order of messages"
                )
