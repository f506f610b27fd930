"""The verifier against mutated schedules.

Mutations are judged by a machine of its own, which runs steps with tokens instead of tensors and knows nothing of the
verifier. Where a mutant hangs or computes with a wrong token, the verifier must object; where it objects although the
machine is content, it must name one of the rules that are about bounds and not about results.
"""

import contextlib
import dataclasses
import random
from collections import Counter, defaultdict

import pytest

from megallm.schedule import (
    Action,
    Kind,
    LoweredSchedule,
    Schedule,
    ScheduleError,
    Step,
    build_schedule,
    lower,
    parse_action,
    verify,
)


class Broken(Exception):
    """The machine computed with a wrong value, or hangs."""


class Machine:
    """Runs lowered steps. A value is the pair (stage, micro-batch) that produced it; a posted buffer holds None."""

    def __init__(self, lowered: LoweredSchedule):
        self.lowered, self.schedule = lowered, lowered.schedule
        self.positions = [0] * len(lowered.steps)
        self.slots = [defaultdict(dict) for _ in lowered.steps]
        self.outputs, self.input_gradients = {}, {}
        self.saved, self.backwards = {}, Counter()
        self.synced, self.forwards, self.input_backwards, self.weight_backwards = [], set(), set(), set()
        self.sent, self.posted, self.delivered = defaultdict(list), defaultdict(list), Counter()
        self.completed = set()

    def need(self, condition, what):
        if not condition:
            raise Broken(what)

    def run(self):
        moved = True
        while moved:
            moved = False
            for rank, steps in enumerate(self.lowered.steps):
                while self.positions[rank] < len(steps) and self.step(rank, steps[self.positions[rank]]):
                    self.positions[rank] += 1
                    self.deliver()
                    moved = True
        self.need(self.positions == [len(steps) for steps in self.lowered.steps], "hangs")
        self.need(
            all(len(self.sent[e]) == len(self.posted[e]) for e in {*self.sent, *self.posted}), "message left over"
        )
        schedule, pairs = self.schedule, []
        for stage in range(schedule.num_stages):
            pairs += [(stage, micro_batch) for micro_batch in range(schedule.num_micro_batches)]
        self.need(self.forwards == set(pairs), "forwards")
        wanted = {pair for pair in pairs if schedule.has_backward(pair[0])}
        self.need(self.input_backwards == self.weight_backwards == wanted, "backwards")
        self.need(sorted(self.synced) == sorted({stage for stage, _ in wanted}), "synchronisations")

    def deliver(self):
        for edge in list(self.sent):
            while self.delivered[edge] < min(len(self.sent[edge]), len(self.posted[edge])):
                send, value = self.sent[edge][self.delivered[edge]]
                receive, pool, slot = self.posted[edge][self.delivered[edge]]
                pool[slot] = value
                self.completed |= {(edge[0], send), (edge[1], receive)}
                self.delivered[edge] += 1

    def step(self, rank, step):
        """False where the step has to wait."""
        action = step.action
        if any((rank, send) not in self.completed for send in step.awaits):
            return False
        key = (action.stage, action.micro_batch)
        self.need(0 <= action.stage < self.schedule.num_stages, "no such stage")
        if action.kind in (Kind.SEND_F, Kind.SEND_B):
            peer_stage = action.stage + (1 if action.kind is Kind.SEND_F else -1)
            self.need(0 <= peer_stage < self.schedule.num_stages, "sends to nobody")
            values = self.outputs if action.kind is Kind.SEND_F else self.input_gradients
            self.need(key in values, "nothing to send")
            self.sent[rank, self.schedule.placement[peer_stage]].append((action, values.pop(key)))
        elif action.kind in (Kind.RECV_F, Kind.RECV_B):
            peer_stage = action.stage - (1 if action.kind is Kind.RECV_F else -1)
            self.need(0 <= peer_stage < self.schedule.num_stages, "receives from nobody")
            pool = self.slots[rank][action.kind]
            size = self.lowered.num_activation_slots if action.kind is Kind.RECV_F else self.lowered.num_gradient_slots
            self.need(step.slot is not None and 0 <= step.slot < size[rank], "no such slot")
            edge = (self.schedule.placement[peer_stage], rank)
            pending = [post[1:] for other, posts in self.posted.items() for post in posts[self.delivered[other] :]]
            self.need(
                not any(other is pool and slot == step.slot for other, slot in pending), "two receives into one buffer"
            )
            pool[step.slot] = None
            self.posted[edge].append((action, pool, step.slot))
        elif action.kind is Kind.GRAD_SYNC:
            self.need(self.backwards[action.stage] == self.schedule.num_micro_batches, "synchronised too early")
            self.synced.append(action.stage)
        else:
            return self.compute(rank, step)
        return True

    def compute(self, rank, step):
        action, schedule = step.action, self.schedule
        stage, micro_batch = key = (action.stage, action.micro_batch)
        self.need(schedule.placement[stage] == rank, "not its rank")
        if action.kind is Kind.F:
            self.need(key not in self.forwards, "forward twice")
            if stage > 0 and schedule.placement[stage - 1] != rank:
                if (rank, Action(Kind.RECV_F, *key)) not in self.completed:
                    return False
                self.saved[key] = step.slot
                self.need(self.slots[rank][Kind.RECV_F].get(step.slot) == (stage - 1, micro_batch), "wrong input")
            elif stage > 0:
                self.need(self.outputs.pop((stage - 1, micro_batch), None) is not None, "no input")
            self.outputs[key] = key
            self.forwards.add(key)
            return True
        self.need(schedule.has_backward(stage), "frozen")
        self.need(key in self.forwards, "backward before forward")
        if key in self.saved:
            value = self.slots[rank][Kind.RECV_F][self.saved[key]]
            self.need(value == (stage - 1, micro_batch), "activation overwritten")
        if action.kind in (Kind.B, Kind.I):
            self.need(key not in self.input_backwards, "backward twice")
            if stage + 1 < schedule.num_stages and schedule.placement[stage + 1] != rank:
                if (rank, Action(Kind.RECV_B, *key)) not in self.completed:
                    return False
                self.saved["gradient", key] = step.slot
                self.need(self.slots[rank][Kind.RECV_B].get(step.slot) == (stage + 1, micro_batch), "wrong gradient")
            elif stage + 1 < schedule.num_stages:
                self.need(self.input_gradients.pop((stage + 1, micro_batch), None) is not None, "no gradient")
            self.input_gradients[key] = key
            self.input_backwards.add(key)
        if action.kind in (Kind.B, Kind.W):
            self.need(key in self.input_backwards, "weights before input")
            self.need(key not in self.weight_backwards, "backward twice")
            if ("gradient", key) in self.saved:
                value = self.slots[rank][Kind.RECV_B][self.saved["gradient", key]]
                self.need(value == (stage + 1, micro_batch), "gradient overwritten")
            self.weight_backwards.add(key)
            self.backwards[stage] += 1
        return True


# Rules about bounds, order for its own sake, or waits and slots that do no harm yet: the machine does not judge these.
RULES = (
    "another order",
    "directly after",
    "is not the last backward",
    "has no micro-batch",
    "outstanding",
    "in flight",
    "reads slot",
    "has no slot",
)


def split_backward(schedule: Schedule) -> Schedule:
    """Every B becomes I, and its W comes after the next I."""
    rows = []
    for row in schedule.actions:
        actions, delayed = [], []
        for action in row:
            if action.kind is Kind.F:
                actions.append(action)
                continue
            actions += [Action(Kind.I, action.stage, action.micro_batch), *delayed]
            delayed = [Action(Kind.W, action.stage, action.micro_batch)]
        rows.append(tuple(actions + delayed))
    return dataclasses.replace(schedule, actions=tuple(rows), name="split", max_in_flight=None)


TURNING_BACK = Schedule.from_csv("0F0,0F1,3F0,3F1,3B0,3B1,0B0,0B1\n1F0,1F1,2F0,2F1,2B0,2B1,1B0,1B1\n", "turning back")

CASES = {
    "1f1b": build_schedule("1f1b", 3, 1, 5),
    "gpipe": build_schedule("gpipe", 3, 2, 3),
    "interleaved": build_schedule("interleaved", 2, 2, 4),
    "interleaved ragged": build_schedule("interleaved", 3, 2, 5),
    "interleaved few": build_schedule("interleaved", 4, 2, 2),
    "frozen": build_schedule("interleaved", 3, 2, 4, first_trainable_stage=2),
    "forward only": build_schedule("1f1b", 3, 1, 5, forward_only=True),
    "one rank": build_schedule("interleaved", 1, 3, 3),
    "split": split_backward(build_schedule("1f1b", 3, 1, 5)),
    "turning back": TURNING_BACK,
}


def judge(lowered: LoweredSchedule) -> bool:
    """Whether the verifier accepts; fails the test where machine and verifier contradict each other."""
    fault = objection = None
    try:
        Machine(lowered).run()
    except Broken as error:
        fault = str(error)
    try:
        verify(lowered)
    except ScheduleError as error:
        objection = str(error)
    if objection is None:
        assert fault is None, f"accepted, but the machine says: {fault}"
    elif fault is None:
        assert any(rule in objection for rule in RULES), f"objects to a sound schedule: {objection}"
    return objection is None


def with_steps(lowered: LoweredSchedule, rank: int, steps: list[Step]) -> LoweredSchedule:
    """The lowered schedule with other steps of one rank; its schedule follows, where these compute something else."""
    rows = list(lowered.steps)
    rows[rank] = tuple(steps)
    schedule = lowered.schedule
    compute = tuple(step.action for step in steps if step.action.kind in (Kind.F, Kind.B, Kind.I, Kind.W))
    actions = list(schedule.actions)
    actions[rank] = compute
    # Where the mutant computes what no schedule can hold, the verifier sees it in the steps.
    with contextlib.suppress(ScheduleError):
        schedule = dataclasses.replace(schedule, actions=tuple(actions))
    return dataclasses.replace(lowered, schedule=schedule, steps=tuple(rows))


def mutate(steps: list[Step], dice: random.Random, kind: str) -> None:
    """Changes `steps` in place in the way that `kind` names; may change nothing where there is nothing to change."""
    index = dice.randrange(len(steps))
    step = steps[index]
    sends = [one.action for one in steps if one.action.kind in (Kind.SEND_F, Kind.SEND_B)]
    if kind == "drop":
        del steps[index]
    elif kind == "duplicate":
        steps.insert(dice.randrange(len(steps) + 1), step)
    elif kind == "swap neighbours":
        other = max(0, index - 1)
        steps[index], steps[other] = steps[other], step
    elif kind == "swap":
        other = dice.randrange(len(steps))
        steps[index], steps[other] = steps[other], step
    elif kind == "swap sends":
        indices = [i for i, one in enumerate(steps) if one.action.kind in (Kind.SEND_F, Kind.SEND_B)]
        if len(indices) > 1:
            one, other = dice.sample(indices, 2)
            steps[one], steps[other] = steps[other], steps[one]
    elif kind == "swap receives":
        indices = [i for i, one in enumerate(steps) if one.action.kind in (Kind.RECV_F, Kind.RECV_B)]
        if len(indices) > 1:
            one, other = dice.sample(indices, 2)
            steps[one], steps[other] = steps[other], steps[one]
    elif kind == "move":
        steps.insert(dice.randrange(len(steps)), steps.pop(index))
    elif kind == "slot":
        used = [one.slot for one in steps if one.slot is not None]
        steps[index] = step._replace(slot=dice.choice([None, -1, 99, 0, *used]))
    elif kind == "reuse slot":
        indices = [i for i, one in enumerate(steps) if one.slot is not None]
        if indices:
            one, other = dice.choice(indices), dice.choice(indices)
            steps[one] = steps[one]._replace(slot=steps[other].slot)
    elif kind == "wait" and sends:
        steps[index] = step._replace(awaits=(*step.awaits, dice.choice(sends)))
    elif kind == "wait for another" and sends:
        indices = [i for i, one in enumerate(steps) if one.awaits]
        if indices:
            one = dice.choice(indices)
            steps[one] = steps[one]._replace(awaits=(dice.choice(sends),))
    elif kind == "micro-batch":
        action = step.action._replace(micro_batch=dice.choice([None, -1, 0, 1, 2, 9]))
        steps[index] = step._replace(action=action)
    elif kind == "stage":
        action = step.action._replace(stage=step.action.stage + dice.choice([-1, 1, 2, 7]))
        steps[index] = step._replace(action=action)
    elif kind == "sync":
        indices = [i for i, one in enumerate(steps) if one.action.kind is Kind.GRAD_SYNC]
        if indices:
            steps.insert(dice.randrange(len(steps)), steps.pop(dice.choice(indices)))


MUTATIONS = [
    "drop",
    "duplicate",
    "swap neighbours",
    "swap",
    "swap sends",
    "swap receives",
    "move",
    "slot",
    "reuse slot",
    "wait",
    "wait for another",
    "micro-batch",
    "stage",
    "sync",
]


@pytest.mark.parametrize("case", CASES)
def test_unchanged_schedules_are_sound(case):
    assert judge(lower(CASES[case]))


@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("rounds", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_random_mutations(kind, rounds):
    rejected = accepted = 0
    for number, schedule in enumerate(CASES.values()):
        dice = random.Random(f"{kind} {number}")
        lowered = lower(schedule)
        for _ in range(rounds):
            rank = dice.randrange(schedule.num_ranks)
            steps = list(lowered.steps[rank])
            mutate(steps, dice, kind)
            mutant = with_steps(lowered, rank, steps)
            if mutant.steps == lowered.steps:
                continue
            if judge(mutant):
                accepted += 1
            else:
                rejected += 1
    assert rejected > 3 * rounds
    if kind in ("drop", "duplicate"):
        assert accepted == 0


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_needed_once(case):
    """Dropping, and repeating, any step at all is noticed on its rank."""
    lowered = lower(CASES[case])
    for rank, steps in enumerate(lowered.steps):
        for index in range(len(steps)):
            for mutant in (steps[:index] + steps[index + 1 :], steps[: index + 1] + steps[index:]):
                with pytest.raises(ScheduleError, match=rf"rank {rank}, (step|after)"):
                    verify(with_steps(lowered, rank, list(mutant)))


@pytest.mark.parametrize("case", CASES)
def test_every_wait_is_needed(case):
    lowered = lower(CASES[case])
    for rank, steps in enumerate(lowered.steps):
        for index, step in enumerate(steps):
            if step.awaits:
                mutant = list(steps)
                mutant[index] = step._replace(awaits=())
                with pytest.raises(ScheduleError, match="3 sends of this kind are outstanding"):
                    verify(with_steps(lowered, rank, mutant))


@pytest.mark.parametrize("kind", ["drop", "duplicate", "swap", "swap neighbours", "split"])
def test_random_mutations_of_the_compute_order(kind):
    """Errors of a builder: what `lower` does not refuse, the verifier must, unless the order is sound."""
    refused = 0
    for number, schedule in enumerate(CASES.values()):
        dice = random.Random(f"{kind} {number}")
        for _ in range(25):
            rank = dice.randrange(schedule.num_ranks)
            rows = [list(row) for row in schedule.actions]
            index, other = dice.randrange(len(rows[rank])), dice.randrange(len(rows[rank]))
            action = rows[rank][index]
            if kind == "drop":
                del rows[rank][index]
            elif kind == "duplicate":
                rows[rank].insert(other, action)
            elif kind == "split":
                # A B of which only one half is done.
                half = Kind.I if dice.random() < 0.5 else Kind.W
                rows[rank][index] = action._replace(kind=half)
            else:
                other = max(0, index - 1) if kind == "swap neighbours" else other
                rows[rank][index], rows[rank][other] = rows[rank][other], action
            mutant = dataclasses.replace(schedule, actions=tuple(map(tuple, rows)))
            if mutant.actions == schedule.actions:
                continue
            sound = False
            with contextlib.suppress(ScheduleError):
                sound = judge(lower.__wrapped__(mutant))
            refused += not sound
            assert not (sound and kind in ("drop", "duplicate", "split"))
    assert refused > 50


def test_swapped_sends_are_named_with_both_ends():
    lowered = lower(build_schedule("gpipe", 2, 1, 2))
    steps = list(lowered.steps[0])
    first, second = (i for i, step in enumerate(steps) if step.action.kind is Kind.SEND_F)
    assert (first, second) == (1, 3)
    steps = [steps[0], steps[2], steps[3], steps[1], *steps[4:]]
    with pytest.raises(ScheduleError, match=r"rank 0, step 2 \(0SEND_F1\) meets rank 1, step 0 \(1RECV_F0\)"):
        verify(with_steps(lowered, 0, steps))


def edit(lowered: LoweredSchedule, rank: int, change) -> LoweredSchedule:
    steps = list(lowered.steps[rank])
    change(steps)
    return with_steps(lowered, rank, steps)


def place(steps: list[Step], text: str) -> int:
    return next(index for index, step in enumerate(steps) if str(step.action) == text)


def wait_before(steps: list[Step], text: str, send: str) -> None:
    """The step `text`, and no other, awaits `send`."""
    awaited = parse_action(send)
    for index, step in enumerate(steps):
        awaits = tuple(one for one in step.awaits if one != awaited)
        steps[index] = step._replace(awaits=awaits + (awaited,) * (str(step.action) == text))


def test_ranks_that_await_each_others_receives_are_a_deadlock():
    """Each rank alone is in order, and so are the channels; but each posts its receive after awaiting its send."""

    def first_rank(steps):
        receive = steps.pop(place(steps, "2RECV_F0"))
        steps.insert(place(steps, "0SEND_F1") + 1, receive)
        wait_before(steps, "2RECV_F0", "0SEND_F1")

    lowered = lower(build_schedule("interleaved", 2, 2, 2))
    one_waits = edit(lowered, 0, first_rank)
    assert judge(one_waits)
    both_wait = edit(one_waits, 1, lambda steps: wait_before(steps, "1RECV_F1", "1SEND_F0"))
    with pytest.raises(Broken, match="hangs"):
        Machine(both_wait).run()
    with pytest.raises(ScheduleError, match=r"for ever: rank 0, step 4 \(2RECV_F0\); rank 1, step 3 \(1RECV_F1\)"):
        verify(both_wait)


def replaced(text: str, **changes):
    def change(steps):
        index = place(steps, text)
        steps[index] = steps[index]._replace(**changes)

    return change


def inserted(index: int, text: str):
    return lambda steps: steps.insert(index, Step(parse_action(text)))


def moved(text: str, behind: str):
    def change(steps):
        step = steps.pop(place(steps, text))
        steps.insert(place(steps, behind) + 1, step)

    return change


def without(*texts: str):
    return lambda steps: [steps.pop(place(steps, text)) for text in texts]


@pytest.mark.parametrize(
    ("case", "change", "sentence"),
    [
        ("1f1b", replaced("0REDUCE_GRAD", action=Action(Kind.GRAD_SYNC, 0, 1)), "has no micro-batch"),
        ("1f1b", inserted(0, "0F9"), "there is no such micro-batch"),
        ("1f1b", inserted(0, "1F0"), "the stage is not on this rank"),
        ("1f1b", inserted(2, "0SEND_B0"), "this stage has no such action"),
        ("frozen", inserted(1, "0B0"), "this stage has no such action"),
        ("1f1b", replaced("0F2", awaits=(Action(Kind.F, 0, 0),)), "which is no send"),
        ("1f1b", replaced("0F2", awaits=(Action(Kind.SEND_F, 0, 3),)), "which is not outstanding"),
        ("1f1b", replaced("0SEND_F0", slot=0), "a send has no slot"),
        ("1f1b", moved("0SEND_F0", behind="0SEND_F1"), "meets rank 1"),
        ("1f1b", moved("0RECV_B0", behind="0B0"), "the receive of its input is not posted yet"),
        ("1f1b", moved("0REDUCE_GRAD", behind="0B3"), "is not the last backward"),
        ("1f1b", without("0REDUCE_GRAD"), "the gradient sync of stage 0 is missing"),
        ("1f1b", without("0B4", "0REDUCE_GRAD"), "the backward of stage 0, micro-batch 4 is missing"),
        ("split", without("0W4", "0REDUCE_GRAD"), "the backward of stage 0, micro-batch 4 is missing"),
        ("split", moved("0W0", behind="0F0"), "the backward of its input has not run yet"),
        ("split", inserted(12, "0B0"), "the gradient of its input is computed already"),
        ("one rank", moved("0F0", behind="1F0"), "stage 0 on the same rank has not run yet"),
        ("one rank", moved("1B0", behind="2F0"), "the backward of stage 2 on the same rank has not run yet"),
    ],
)
def test_each_fault_has_its_own_sentence(case, change, sentence):
    with pytest.raises(ScheduleError, match=sentence):
        verify(edit(lower(CASES[case]), 0, change))


def test_steps_must_compute_what_the_schedule_says():
    lowered = lower(build_schedule("gpipe", 1, 1, 2))
    steps = lowered.steps[0]
    swapped = dataclasses.replace(lowered, steps=((steps[1], steps[0], *steps[2:]),))
    with pytest.raises(ScheduleError, match="another order than the schedule"):
        verify(swapped)


def test_budget_given_by_the_caller():
    lowered = lower(build_schedule("1f1b", 4, 1, 8))
    verify(lowered, max_in_flight=(4, 3, 2, 1))
    with pytest.raises(ScheduleError, match=r"rank 0, step \d+ \(0F3\): 4 activations are in flight, 3 are allowed"):
        verify(lowered, max_in_flight=3)
    with pytest.raises(ScheduleError, match="2 entries for 4 ranks"):
        verify(lowered, max_in_flight=(4, 4))


def test_tables_of_another_size_are_refused():
    lowered = lower(build_schedule("1f1b", 2, 1, 2))
    for name in ("steps", "num_activation_slots", "num_gradient_slots"):
        with pytest.raises(ScheduleError, match=f"{name} has 1 entries for 2 ranks"):
            verify(dataclasses.replace(lowered, **{name: getattr(lowered, name)[:1]}))


def test_an_order_that_waits_for_itself_is_refused():
    with pytest.raises(ScheduleError, match="inputs never arrive for rank 0 at 0B0, rank 1 at 1F1"):
        lower(Schedule.from_csv("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n"))
