"""Runs that save a checkpoint and go on, and runs that take it up under another layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megallm.checkpoint.boxes import local_boxes
from megallm.train.engine import Engine
from megallm.train.resume import load_engine
from megallm.train.saving import save_engine
from megallm.train.step import train_step
from tests.distributed.parity import GPT, LLAMA, Case, global_batch, make_engine, micro_batches
from tests.distributed.parity_cases import CLIPPED, DROPOUT, ODD_VOCABULARY, SEVEN_LAYERS
from tests.distributed.pool import WorkerPool

NUM_BEFORE, NUM_AFTER = 3, 3
BATCH = 8
# A learning rate that changes from step to step, so that a wrong position is seen in the losses.
WARMING_UP = {"optimizer.lr_decay_style": "cosine", "optimizer.lr_warmup_iters": 5, "optimizer.lr": 1e-2}
TIED = GPT | DROPOUT | ODD_VOCABULARY | CLIPPED | WARMING_UP
UNTIED = LLAMA | SEVEN_LAYERS | ODD_VOCABULARY | WARMING_UP
BF16 = UNTIED | {"training.fp64": False, "training.bf16": True}


@dataclass
class Log:
    """What one rank saw. `at_checkpoint` and `at_end` are boxes as `assemble` takes them."""

    at_checkpoint: list[Any]
    progress: tuple[float, ...]
    losses: list[float]
    at_end: list[Any]


def train_and_save(rank: int, case: Case, root: str) -> Log:
    """Trains, saves, and goes on without a break."""
    engine = make_engine(rank, case)
    _train(engine, case, NUM_BEFORE)
    _pretend_a_skipped_step_and_an_evaluation(engine)
    save_engine(engine, root)
    return _continue(engine, case)


def load_and_train(rank: int, case: Case, root: str) -> Log:
    """Takes up what `train_and_save` saved, over other weights (the seed keys dropout too)."""
    seed = {} if "model.hidden_dropout" in case.features else {"training.seed": 99}
    engine = make_engine(rank, replace(case, layout=case.layout | seed))
    assert load_engine(engine, root) is not None
    return _continue(engine, case)


def _continue(engine: Engine, case: Case) -> Log:
    progress = engine.progress
    log = Log(_state(engine), (), [], [])
    log.progress = (
        progress.iteration,
        progress.consumed_samples,
        progress.consumed_valid_samples,
        float(progress.position),
        float(progress.num_updates),
        *{float(shard.state.num_updates) for shard in engine.optimizer.shards},
    )
    log.losses = _train(engine, case, NUM_AFTER)
    engine.reducer.finish_gather()
    log.at_end = _state(engine)
    engine.mesh.close()
    return log


def _train(engine: Engine, case: Case, num_steps: int) -> list[float]:
    model, losses = engine.config.model, []
    assert model.vocab_size is not None
    for _ in range(num_steps):
        batch = global_batch(
            engine.progress.iteration, BATCH, engine.config.data.seq_length, model.vocab_size, case.mask
        )
        losses.append(float(train_step(engine, micro_batches(engine, batch)).losses[0]))
    return losses


def _pretend_a_skipped_step_and_an_evaluation(engine: Engine) -> None:
    """Makes every counter different from the others, so that none can stand in for another."""
    engine.progress.position -= BATCH
    engine.progress.num_updates -= 1
    for shard in engine.optimizer.shards:
        shard.state.num_updates -= 1
    engine.progress.consumed_valid_samples = 5 * BATCH


def _state(engine: Engine) -> list[Any]:
    return [
        (f"{box.kind}/{box.name}", box.global_shape, box.offset, box.tensor.numpy().copy(), box.saves)
        for box in local_boxes(engine.optimizer, engine.chunks, engine.mesh)
    ]


class SavedRuns:
    """The run of each case and its checkpoint, made once."""

    def __init__(self, pool: WorkerPool, folder: Path) -> None:
        self.pool = pool
        self.folder = folder
        self._logs: dict[str, tuple[str, list[Log]]] = {}

    def of(self, case: Case) -> tuple[str, list[Log]]:
        """The folder of checkpoints, and every rank's log."""
        key = repr(sorted(case.settings().items()) + [case.dp])
        if key not in self._logs:
            root = str(self.folder / f"run{len(self._logs)}")
            self._logs[key] = root, self.pool.run(case.world_size, train_and_save, case, root, timeout=300.0)
        return self._logs[key]
