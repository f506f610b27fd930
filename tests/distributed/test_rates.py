"""Learning rate, weight decay and the kind of update over a break in the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megallm.train.resume import load_engine
from tests.distributed.checkpoint_runs import UNTIED, load_and_train, train_and_save
from tests.distributed.parity import Case, make_engine
from tests.distributed.parity_cases import DECOUPLED, SGD
from tests.distributed.pool import WorkerPool

FROM_CHECKPOINT = {"optimizer.use_checkpoint_opt_param_scheduler": True}
OTHERS = {
    "optimizer.lr": 0.5,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.lr_decay_style": "constant",
    "optimizer.end_weight_decay": 0.0,
    "optimizer.decoupled_lr": 0.7,
}


def try_to_load(rank: int, case: Case, root: str) -> str:
    engine = make_engine(rank, case)
    try:
        load_engine(engine, root)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_the_schedule_of_the_checkpoint_holds_where_it_is_asked_for(pool: WorkerPool, tmp_path: Path) -> None:
    case = Case("sgd", UNTIED | SGD | DECOUPLED)
    (log,) = pool.run(1, train_and_save, case, str(tmp_path))
    changed = replace(case, layout=OTHERS)
    (other,) = pool.run(1, load_and_train, changed, str(tmp_path))
    assert other.losses != log.losses
    (same,) = pool.run(1, load_and_train, replace(case, layout=OTHERS | FROM_CHECKPOINT), str(tmp_path))
    assert same.losses == log.losses
    assert {name.partition("/")[0] for name, *_ in same.at_end} == {"weights", "momentum"}
    (refusal,) = pool.run(1, try_to_load, replace(case, layout={"optimizer.optimizer": "adam"}), str(tmp_path))
    assert "holds momentum and weights, but no first_moment and no second_moment" in refusal


@pytest.mark.slow
def test_the_state_of_sgd_loads_under_another_layout(pool: WorkerPool, tmp_path: Path) -> None:
    case = Case("sgd", UNTIED | SGD | DECOUPLED, dp=2, layout={"parallel.use_distributed_optimizer": True})
    log = pool.run(2, train_and_save, case, str(tmp_path))[0]
    other = pool.run(2, load_and_train, Case("tensor", case.features, tp=2), str(tmp_path))[0]
    assert other.losses == pytest.approx(log.losses, rel=1e-11)
