"""Builders: the compute order of each schedule we know. Messages, waits and buffers are added by `lower`.

A builder is a function of one rank. It returns the rank's actions for full training and the number of (stage,
micro-batch) pairs that are between forward and backward at most. Frozen stages and evaluation are not its business:
`build_schedule` leaves out the backwards that do not exist, which only relaxes the order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

from megallm.schedule.action import Action, Kind, Schedule

Builder = Callable[[int, int, int, int, int], tuple[list[Action], int]]


def gpipe(rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int, group: int) -> tuple[list[Action], int]:
    """All forwards, then all backwards. With virtual stages: chunk after chunk, each for all micro-batches.

    Bubble (p-1)/(v*m + p-1); every activation of the step is held.
    """
    total = num_virtual * num_micro_batches
    forwards, backwards = _chunk_orders(rank, num_ranks, num_virtual, [num_micro_batches])
    return _alternate(forwards, backwards, warm_up=total), total


def one_f_one_b(
    rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int, group: int
) -> tuple[list[Action], int]:
    """One forward, one backward, once the pipeline is full (PipeDream-flush). One stage per rank.

    Bubble (p-1)/(m + p-1), as GPipe's, but a rank holds at most p - rank micro-batches.
    """
    forwards, backwards = _chunk_orders(rank, num_ranks, num_virtual, [num_micro_batches])
    warm_up = min(num_ranks - rank - 1, num_micro_batches)
    return _alternate(forwards, backwards, warm_up), min(num_ranks - rank, num_micro_batches)


def interleaved(
    rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int, group: int
) -> tuple[list[Action], int]:
    """Interleaved 1F1B (Narayanan et al. 2021): groups of micro-batches pass through the rank's chunks in turn.

    Bubble (p-1)/(v*m + p-1) where `group` divides m. The warm-up, 2(p - rank - 1) + (v - 1) * group forwards, is
    Megatron's. Where `group` does not divide m, the micro-batches are dealt evenly over m // group groups: a last group
    smaller than p would let rank 0 wait for a rank that waits for rank 0.
    """
    sizes = group_sizes(num_micro_batches, group)
    forwards, backwards = _chunk_orders(rank, num_ranks, num_virtual, sizes)
    total = num_virtual * num_micro_batches
    warm_up = min(2 * (num_ranks - rank - 1) + (num_virtual - 1) * sizes[0], total)
    return _alternate(forwards, backwards, warm_up), min(warm_up + 1, total)


def group_sizes(num_micro_batches: int, group: int) -> list[int]:
    """Micro-batches of each group of the interleaved schedule, for a wished size of `group`: larger ones first."""
    num_groups = max(1, num_micro_batches // group)
    small, extra = divmod(num_micro_batches, num_groups)
    return [small + (index < extra) for index in range(num_groups)]


BUILDERS: dict[str, Builder] = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved}


def _chunk_orders(
    rank: int, num_ranks: int, num_virtual: int, group_sizes: list[int]
) -> tuple[list[Action], list[Action]]:
    """Forwards and backwards of a rank, each group of micro-batches going through all chunks before the next group."""
    stages = [chunk * num_ranks + rank for chunk in range(num_virtual)]
    groups = [range(end - size, end) for size, end in zip(group_sizes, accumulate(group_sizes), strict=True)]
    forwards = [Action(Kind.F, stage, index) for group in groups for stage in stages for index in group]
    backwards = [Action(Kind.B, stage, index) for group in groups for stage in reversed(stages) for index in group]
    return forwards, backwards


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """`warm_up` forwards, then one forward and one backward in turn, then the remaining backwards."""
    steady = len(forwards) - warm_up
    pairs = zip(forwards[warm_up:], backwards[:steady], strict=True)
    return forwards[:warm_up] + [action for pair in pairs for action in pair] + backwards[steady:]


# Bounded, because a batch-size ramp-up walks through many micro-batch counts and needs each for a while only.
@lru_cache(maxsize=64)
def build_schedule(
    name: str,
    num_ranks: int,
    num_virtual_stages: int,
    num_micro_batches: int,
    *,
    first_trainable_stage: int = 0,
    forward_only: bool = False,
    micro_batch_group_size: int | None = None,
) -> Schedule:
    """The schedule `name` ("gpipe", "1f1b" or "interleaved"), cached by its arguments.

    Args:
        num_ranks: ranks of the pipeline, p.
        num_virtual_stages: stages per rank, v. Stage s is on rank `s % num_ranks`.
        num_micro_batches: any positive number, m; it need not divide by anything.
        first_trainable_stage: stages below it are frozen and get no backward.
        forward_only: evaluation; no backward at all.
        micro_batch_group_size: only for "interleaved": micro-batches that pass through a chunk before the rank
            turns to its next chunk. Default and least value: `num_ranks`.

    Raises:
        ValueError: the arguments are impossible.
    """
    _check_arguments(name, num_ranks, num_virtual_stages, num_micro_batches, micro_batch_group_size)
    num_stages = num_ranks * num_virtual_stages
    if not 0 <= first_trainable_stage < num_stages:
        raise ValueError(
            f"first_trainable_stage {first_trainable_stage} is outside 0 to {num_stages - 1} "
            f"({num_ranks} ranks x {num_virtual_stages} virtual stages); if nothing trains, use forward_only"
        )
    group = micro_batch_group_size or num_ranks
    build = BUILDERS[name]
    orders = [build(rank, num_ranks, num_virtual_stages, num_micro_batches, group) for rank in range(num_ranks)]
    first_backward = num_stages if forward_only else first_trainable_stage
    actions = tuple(
        tuple(action for action in order if action.kind is Kind.F or action.stage >= first_backward)
        for order, _ in orders
    )
    return Schedule(
        name=name,
        num_ranks=num_ranks,
        num_stages=num_stages,
        num_micro_batches=num_micro_batches,
        placement=tuple(stage % num_ranks for stage in range(num_stages)),
        actions=actions,
        first_trainable_stage=first_trainable_stage,
        forward_only=forward_only,
        max_in_flight=tuple(0 if forward_only else in_flight for _, in_flight in orders),
    )


def _check_arguments(
    name: str, num_ranks: int, num_virtual_stages: int, num_micro_batches: int, micro_batch_group_size: int | None
) -> None:
    if name not in BUILDERS:
        raise ValueError(f"there is no schedule {name!r}; choose one of {', '.join(BUILDERS)}")
    sizes = {
        "num_ranks": num_ranks,
        "num_virtual_stages": num_virtual_stages,
        "num_micro_batches": num_micro_batches,
    }
    for what, value in sizes.items():
        if value < 1:
            raise ValueError(f"{what} is {value}; it must be at least 1")
    if name == "1f1b" and num_virtual_stages != 1:
        raise ValueError(
            f"1f1b has one stage per rank, but num_virtual_stages is {num_virtual_stages}; "
            "use interleaved for virtual stages"
        )
    if micro_batch_group_size is None:
        return
    if name != "interleaved":
        raise ValueError(f"micro_batch_group_size belongs to interleaved; {name} has no groups of micro-batches")
    if micro_batch_group_size < num_ranks:
        raise ValueError(
            f"micro_batch_group_size {micro_batch_group_size} is smaller than the {num_ranks} ranks: the first rank "
            f"would wait for a group that the last one has not finished; the least value is {num_ranks}"
        )
