"""Actions and schedules: what every pipeline rank computes, and in which order.

The text form of an action is torch's: ``2F0`` is the forward of micro-batch 0 on stage 2, ``2SEND_F0`` sends its
output, ``2REDUCE_GRAD`` closes the gradients of stage 2. Schedules exchange with torch.distributed.pipelining as CSV.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class ScheduleError(RuntimeError):
    """A schedule that cannot run or would compute something wrong: our mistake, or a broken file."""


class Kind(str, Enum):
    """What an action does. The values are torch's spelling."""

    F = "F"  # forward
    B = "B"  # whole backward
    I = "I"  # noqa: E741  backward of the input only
    W = "W"  # backward of the weights only
    SEND_F = "SEND_F"  # the stage sends its output to the next stage
    RECV_F = "RECV_F"  # the stage receives its input from the stage before
    SEND_B = "SEND_B"  # the stage sends the gradient of its input to the stage before
    RECV_B = "RECV_B"  # the stage receives the gradient of its output from the next stage
    GRAD_SYNC = "REDUCE_GRAD"  # the stage's gradients of this step are complete

    # Enum hashes through a Python function; schedules hash tens of thousands of actions.
    __hash__ = str.__hash__


COMPUTE_KINDS = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
SEND_KINDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECV_KINDS = frozenset({Kind.RECV_F, Kind.RECV_B})

_ACTION_TEXT = re.compile(r"(\d+)([A-Z_]+)(\d*)")


class Action(NamedTuple):
    """One thing that a rank does for one stage. `micro_batch` is None for GRAD_SYNC and for nothing else.

    A tuple, since schedules make and look up hundreds of thousands: it costs half of what a dataclass does.
    """

    kind: Kind
    stage: int
    micro_batch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{'' if self.micro_batch is None else self.micro_batch}"


def parse_action(text: str) -> Action:
    """The reverse of `str(action)`. Raises ValueError for anything that is not one action."""
    match = _ACTION_TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text[:40]!r} is not an action; the form is stage, kind, micro-batch, as in 2F0 or 2REDUCE_GRAD"
        )
    stage, kind_text, micro_batch = match.groups()
    try:
        kind = Kind(kind_text)
    except ValueError:
        known = ", ".join(kind.value for kind in Kind)
        raise ValueError(f"{text!r} has the unknown kind {kind_text}; the kinds are {known}") from None
    if (kind is Kind.GRAD_SYNC) != (micro_batch == ""):
        wanted = "no micro-batch" if kind is Kind.GRAD_SYNC else "a micro-batch"
        raise ValueError(f"{text!r}: {kind.value} takes {wanted}")
    return Action(kind, int(stage), int(micro_batch) if micro_batch else None)


@dataclass(frozen=True)
class Schedule:
    """The compute order of every rank; messages are added by `lower`.

    Attributes:
        name: who made it; only for people to read.
        num_ranks: ranks of one pipeline.
        num_stages: stages of the whole model, `num_ranks * num_virtual_stages` when a builder made the schedule.
        num_micro_batches: micro-batches of one step.
        placement: the rank of each stage. Builders place stage s on rank `s % num_ranks`.
        actions: for each rank its F, B, I and W in order.
        first_trainable_stage: stages below it are frozen: they have no backward, and it sends no gradient to them.
        forward_only: no stage has a backward (evaluation).
        max_in_flight: for each rank how many (stage, micro-batch) pairs may be between forward and backward at once;
            what the builder promises and the verifier checks. None promises nothing.
    """

    name: str
    num_ranks: int
    num_stages: int
    num_micro_batches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    first_trainable_stage: int = 0
    forward_only: bool = False
    max_in_flight: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ScheduleError for what could not even be walked: bad sizes, placement or actions."""
        if min(self.num_ranks, self.num_stages, self.num_micro_batches) < 1:
            raise ScheduleError(
                f"{self.num_ranks} ranks, {self.num_stages} stages, {self.num_micro_batches} micro-batches: "
                "each must be at least 1"
            )
        if len(self.placement) != self.num_stages or set(self.placement) != set(range(self.num_ranks)):
            raise ScheduleError(
                f"the placement {self.placement} does not give each of {self.num_stages} stages "
                f"a rank below {self.num_ranks} and each rank a stage"
            )
        if not 0 <= self.first_trainable_stage < self.num_stages:
            raise ScheduleError(
                f"first_trainable_stage {self.first_trainable_stage} is outside 0 to {self.num_stages - 1}"
            )
        if len(self.actions) != self.num_ranks:
            raise ScheduleError(f"there are {len(self.actions)} lists of actions for {self.num_ranks} ranks")
        for rank, actions in enumerate(self.actions):
            own = set(self.stages_of(rank))
            for index, action in enumerate(actions):
                kind, stage, micro_batch = action
                if kind not in COMPUTE_KINDS:
                    raise ScheduleError(f"rank {rank}, action {index} ({action}) is not compute")
                if stage not in own:
                    raise ScheduleError(f"rank {rank}, action {index} ({action}): the stage is not on this rank")
                if micro_batch is None or not 0 <= micro_batch < self.num_micro_batches:
                    raise ScheduleError(f"rank {rank}, action {index} ({action}): there is no such micro-batch")

    # Schedules are keys of caches. The actions would make every look-up slow, and nearly never tell two keys apart.
    def __hash__(self) -> int:
        return hash((self.name, self.num_ranks, self.num_stages, self.num_micro_batches, self.first_trainable_stage))

    def has_backward(self, stage: int) -> bool:
        """Whether gradients flow through `stage`."""
        return not self.forward_only and stage >= self.first_trainable_stage

    def crosses_ranks(self, stage: int) -> bool:
        """Whether `stage` and the stage before it are on different ranks, so that values between them are messages.

        False for stage 0, which has no stage before it, and between two stages of one rank, which hand values over
        inside the process: there is no SEND or RECV for them.
        """
        return stage > 0 and self.placement[stage - 1] != self.placement[stage]

    def receives_activation(self, stage: int) -> bool:
        """Whether RECV_F exists for `stage` (and SEND_F for the stage before it)."""
        return self.crosses_ranks(stage)

    def sends_activation(self, stage: int) -> bool:
        """Whether SEND_F exists for `stage`."""
        return stage + 1 < self.num_stages and self.crosses_ranks(stage + 1)

    def sends_gradient(self, stage: int) -> bool:
        """Whether SEND_B exists for `stage`: there is a stage before it, elsewhere, that trains."""
        return self.crosses_ranks(stage) and self.has_backward(stage - 1)

    def receives_gradient(self, stage: int) -> bool:
        """Whether RECV_B exists for `stage`."""
        return self.sends_activation(stage) and self.has_backward(stage)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank in ascending order: its chunks."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def fingerprint(self) -> str:
        """A hash of everything in hexadecimal, equal on every machine. Ranks compare it before the first step."""
        lines = [
            f"{self.name} {self.num_ranks} {self.num_stages} {self.num_micro_batches}",
            f"{self.first_trainable_stage} {int(self.forward_only)} {self.max_in_flight} {self.placement}",
        ]
        lines += [" ".join(map(str, rank_actions)) for rank_actions in self.actions]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_csv(self) -> str:
        """One row per rank, one action per cell: what torch reads with format="compute_only"."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.actions)
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str, name: str = "csv") -> Schedule:
        """Reads what `to_csv` or torch wrote (compute only; empty cells are bubbles and are skipped).

        Everything that the file does not say is inferred: the placement from the rows in which stages appear, the
        first trainable stage from the lowest backward. Raises ValueError, naming row and cell, for text that is no
        schedule. Whether the schedule can run is for `lower` and `verify` to say.
        """
        rows = []
        for row_number, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
            rows.append(tuple(_read_cell(cell, row_number) for cell in cells if cell.strip()))
        every_action = [action for row in rows for action in row]
        if not every_action:
            raise ValueError("the file holds no action; it needs one row per rank, with cells such as 0F0,0B0")
        owner: dict[int, int] = {}
        for rank, row in enumerate(rows):
            for action in row:
                if owner.setdefault(action.stage, rank) != rank:
                    raise ValueError(
                        f"stage {action.stage} is on row {owner[action.stage] + 1} and on row {rank + 1}; "
                        "a stage belongs to one rank"
                    )
        num_stages = max(owner) + 1
        absent = sorted(set(range(num_stages)) - set(owner))
        if absent:
            raise ValueError(f"stages 0 to {num_stages - 1} are expected, but no row has stage {absent[0]}")
        with_backward = [action.stage for action in every_action if action.kind is not Kind.F]
        return cls(
            name=name,
            num_ranks=len(rows),
            num_stages=num_stages,
            num_micro_batches=max(action.micro_batch or 0 for action in every_action) + 1,
            placement=tuple(owner[stage] for stage in range(num_stages)),
            actions=tuple(rows),
            first_trainable_stage=min(with_backward, default=0),
            forward_only=not with_backward,
        )


def _read_cell(cell: str, row_number: int) -> Action:
    try:
        action = parse_action(cell)
    except ValueError as error:
        raise ValueError(f"row {row_number}: {error}") from None
    if action.kind not in COMPUTE_KINDS:
        raise ValueError(
            f"row {row_number}: {action} is not compute; messages are derived, so write F, B, I and W only"
        )
    return action
