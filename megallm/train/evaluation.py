"""Evaluation on data that is not trained on, which can be interrupted; and the batches that a run reads."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing

import torch

from megallm.config.batch_sizes import BatchSizes
from megallm.data.feeding.loader import SampleSource, build_loader
from megallm.data.feeding.orders import SampleOrder, build_order
from megallm.data.feeding.sampler import GlobalBatchSampler
from megallm.train.datasets import Datasets
from megallm.train.engine import Engine
from megallm.train.metrics import Reporter, mean_losses
from megallm.train.step import Batch, evaluate_step
from megallm.train.stopping import NOTHING, Ask, Wish


class Evaluation:
    """Evaluates on each validation set, each time where the last evaluation left it; at the end on the test data.

    Attribute `seconds`: the longest that an evaluation on all validation sets has taken.
    """

    def __init__(self, engine: Engine, datasets: Datasets, stack: ExitStack) -> None:
        self._engine, self._datasets = engine, datasets
        self._is_full = engine.config.data.full_validation
        consumed = engine.progress.consumed_valid_samples
        self._batches = {
            name: stack.enter_context(closing(global_batches(engine, dataset, consumed, self._batch_sizes)))
            for name, dataset in ({} if self._is_full else datasets.valid).items()
        }
        self._under_way: Iterator[None] | None = None
        self.seconds = 0.0

    @property
    def has_test(self) -> bool:
        """Whether there is test data."""
        return self._datasets.test is not None

    @property
    def _batch_sizes(self) -> BatchSizes:
        size = self._engine.config.training.global_batch_size
        assert size, "the configuration is resolved"
        return BatchSizes.constant(size)

    def run(self, reporter: Reporter, ask: Ask) -> Wish:
        """Reads `--eval-iters` global batches of each set, or all whole ones, and publishes their mean losses.

        Returns at once what `ask`, called after each batch, wants. The next call then goes on where this one was; in
        another run the evaluation is due again, from its beginning.
        """
        if self._under_way is None:
            self._under_way = self._validate(reporter)
        wish = _drive(self._under_way, ask)
        if not wish.save:
            self._under_way = None
        return wish

    def run_test(self, reporter: Reporter, ask: Ask) -> Wish:
        """The same on the test data, if there is some, on less where there is less; what is interrupted is lost."""
        test = self._datasets.test
        if test is None:
            return NOTHING
        num_batches = min(self._engine.config.training.eval_iters, len(test) // self._batch_sizes.at(0))
        with closing(global_batches(self._engine, test, 0, self._batch_sizes, "single")) as batches:
            return _drive(self._evaluate(reporter, batches, num_batches, "", test=True), ask)

    def _validate(self, reporter: Reporter) -> Iterator[None]:
        progress, training = self._engine.progress, self._engine.config.training
        seconds = 0.0
        for name, dataset in self._datasets.valid.items():
            if self._is_full:
                with closing(global_batches(self._engine, dataset, 0, self._batch_sizes, "single")) as batches:
                    seconds += yield from self._evaluate(
                        reporter, batches, len(dataset) // self._batch_sizes.at(0), name
                    )
            else:
                seconds += yield from self._evaluate(reporter, self._batches[name], training.eval_iters, name)
        if not self._is_full:
            progress.consumed_valid_samples += training.eval_iters * self._batch_sizes.at(0)
        progress.evaluation_due = False
        self.seconds = max(self.seconds, seconds)

    def _evaluate(
        self, reporter: Reporter, batches: Iterator[list[Batch]], num_batches: int, name: str, *, test: bool = False
    ) -> Generator[None, None, float]:
        """Comes back after each batch; gives the seconds that all took, without what was done in between."""
        engine = self._engine
        reporter.flush()
        seconds = 0.0
        totals = torch.zeros((2, len(engine.task.term_names)), dtype=torch.float64, device=engine.mesh.device)
        for _ in range(num_batches):
            begin, resume = time.perf_counter(), reporter.pause()
            totals += torch.stack(evaluate_step(engine, next(batches)))
            resume()
            seconds += time.perf_counter() - begin
            yield
        begin, resume = time.perf_counter(), reporter.pause()
        losses = mean_losses(totals[0], totals[1], engine.task.term_names)
        progress = engine.progress
        reporter.evaluation(progress.iteration, progress.consumed_samples, losses, name, test=test)
        resume()
        return seconds + time.perf_counter() - begin


def _drive(evaluation: Iterator[None], ask: Ask) -> Wish:
    """Goes on with an evaluation to its end, or until something is asked for."""
    for _ in evaluation:
        wish = ask()
        if wish.save:
            return wish
    return NOTHING


def global_batches(
    engine: Engine, dataset: SampleSource, consumed_samples: int, batch_sizes: BatchSizes, order: str | None = None
) -> Generator[list[Batch], None, None]:
    """This rank's micro-batches of one global batch after another, on the device, as long as there are samples."""
    device, num_workers = engine.mesh.device, engine.config.data.num_workers
    if num_workers is None:
        # Without a GPU the processes would take their time from the training.
        num_workers = 2 if device.type == "cuda" else 0
    sampler = GlobalBatchSampler(order_of(engine, dataset, order), consumed_samples, batch_sizes, engine.data_share)
    with closing(build_loader(dataset, sampler, num_workers, pin_memory=device.type == "cuda")) as loader:
        for micro_batches in loader:
            yield [
                {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
                for micro_batch in micro_batches
            ]


def order_of(engine: Engine, dataset: SampleSource, kind: str | None = None) -> SampleOrder:
    """The order in which samples are read: that of --dataloader-type, or of another `kind`."""
    data = engine.config.data
    return build_order(kind or data.dataloader_type, len(dataset), engine.data_share, sharding=data.data_sharding)
