"""What every tensor rank holds whole: messages start in one order on all ranks, and copies stay equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megallm.communication import Transport, Work
from megallm.train.engine import Engine
from megallm.train.step import train_step
from tests.distributed.parity import Case, assemble, make_engine, masked_batch, micro_batches, run_case
from tests.distributed.parity_cases import BERT, NO_SEQUENCE_PARALLEL, OVERLAPPED_ALL_REDUCE, TWO_PER_MICRO_BATCH
from tests.distributed.pool import WorkerPool

SMALL = BERT | {"model.num_layers": 2}
OVERLAPPED = TWO_PER_MICRO_BATCH | OVERLAPPED_ALL_REDUCE


def messages_of_a_step(rank: int, case: Case) -> list[str]:
    """What this rank sends in one training step, by kind and group, in order."""
    engine = make_engine(rank, case)
    batch = micro_batches(engine, masked_batch(0, 8, engine.config.data.seq_length, 52))
    started: list[str] = []
    start = Transport.start

    def start_and_note(self: Transport, operation: Callable[[bool], Any], late: bool, name: str = "message") -> Work:
        group, _, _ = self.name.partition(" (")
        started.append(f"{name} over {group}")
        return start(self, operation, late, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "start", start_and_note)
        train_step(engine, batch)
    engine.mesh.close()
    return started


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(OVERLAPPED, id="sequence parallel"),
        pytest.param(OVERLAPPED | NO_SEQUENCE_PARALLEL, id="", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_start_their_messages_in_one_order(pool: WorkerPool, layout: dict[str, Any]) -> None:
    """The head of BERT lies whole on every tensor rank, and only the first one's gradients count.

    Ranks 0 and 2 are the first ones of their tensor groups. Without sequence parallelism these put the copies that
    count in the norm into other buckets than their neighbours do, but reduce them among themselves.
    """
    ranks = pool.run(4, messages_of_a_step, Case("", SMALL, tp=2, dp=2, layout=layout, kind="bert"))
    assert ranks[0] == ranks[2]
    assert ranks[1] == ranks[3]
    first, second = ([message for message in messages if "over tp" in message] for messages in ranks[:2])
    assert first == second
    begun = first.index("all_reduce over tp+cp+dp")
    assert "over tp" in {message[-7:] for message in first[begun:]}, "hidden behind the rest of the backward pass"


def round_otherwise_on_the_last_rank(engine: Engine) -> None:
    """As products may, whose result is the same on all tensor ranks but for the last bits; more of them, to be seen."""
    if engine.mesh.tp.rank == engine.mesh.tp.size - 1:
        for chunk in engine.chunks.values():
            transform = chunk.head.transform  # type: ignore[union-attr]
            transform.register_forward_hook(lambda module, inputs, output: output + 2.0**-30)  # type: ignore[union-attr,operator]


def test_copies_stay_equal_where_ranks_round_differently(pool: WorkerPool) -> None:
    layout = NO_SEQUENCE_PARALLEL | {"training.micro_batch_size": 8}
    case = Case("", SMALL, tp=2, layout=layout, kind="bert", num_steps=2)
    outcomes = pool.run(2, run_case, case, round_otherwise_on_the_last_rank)
    weights = assemble(outcomes, "weights")  # compares all copies
    assert torch.from_numpy(weights["head.norm.weight"]).isfinite().all()
