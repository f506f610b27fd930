"""The run: from a configuration to a trained model."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path

import torch

from megallm.agreement import on_every_rank
from megallm.config.batch_sizes import BatchSizes
from megallm.config.resolve import train_samples
from megallm.config.tree import Config
from megallm.data.feeding.loader import SampleSource, build_loader
from megallm.data.feeding.orders import SampleOrder, build_order
from megallm.data.feeding.sampler import GlobalBatchSampler
from megallm.device import Measures
from megallm.file_lock import own_folder
from megallm.mesh import Mesh
from megallm.plan.flops import parameter_count
from megallm.schedule import simulate
from megallm.train.data_order import data_order
from megallm.train.datasets import Datasets, build_datasets, build_tokenizer_of, with_vocabulary
from megallm.train.engine import Engine, build_engine, check_schedules
from megallm.train.hugging_face import check_export
from megallm.train.instruments import Instruments
from megallm.train.metrics import Reporter, log_on_rank_zero, mean_losses
from megallm.train.out_of_memory import out_of_memory_explained
from megallm.train.outputs import try_outputs
from megallm.train.prediction import Prediction
from megallm.train.processes import joined_processes
from megallm.train.resume import take_up
from megallm.train.saving import Saving
from megallm.train.step import Batch, evaluate_step, train_step
from megallm.train.stopping import ExitCode, Stopping
from megallm.train.tasks.task import Task

WriteSample = Callable[[Engine], str]


def pretrain(config: Config, make_task: Callable[[Config], Task], write_sample: WriteSample | None = None) -> ExitCode:
    """Trains as `config` says, in the processes that torchrun started or in this one alone.

    `write_sample` lets the model write a text where the configuration asks for that. Returns the code with which the
    program is to end.

    Raises ValueError, the same on every rank, for a mistake in the configuration or in a file it names.
    """
    started = time.monotonic()
    with joined_processes(config) as (resolved, mesh):
        return pretrain_on(mesh, resolved, make_task, started, write_sample)


def pretrain_on(
    mesh: Mesh,
    config: Config,
    make_task: Callable[[Config], Task],
    started: float,
    write_sample: WriteSample | None = None,
) -> ExitCode:
    """The same for processes that have joined, with a resolved configuration, since `started` (`time.monotonic()`)."""
    with ExitStack() as stack:
        with_tokenizer, datasets = on_every_rank(mesh, lambda: _read_files(config, mesh.shape.world_size))
        on_every_rank(mesh, lambda: _take_outputs(config, stack) if mesh.rank == 0 else None)
        task = make_task(with_tokenizer)
        stack.enter_context(out_of_memory_explained(with_tokenizer, mesh))
        return _run(with_tokenizer, task, mesh, datasets, started, write_sample)


def _take_outputs(config: Config, stack: ExitStack) -> None:
    """The first rank sees that everything can be written, and has the folder of checkpoints for this job alone."""
    try_outputs(config)
    check_export(config)
    if config.checkpoint.save:
        stack.enter_context(own_folder(Path(config.checkpoint.save), log_on_rank_zero(0)))


def _read_files(config: Config, world_size: int) -> tuple[Config, Datasets]:
    tokenizer = build_tokenizer_of(config)
    config = with_vocabulary(config, tokenizer, world_size)
    return config, build_datasets(config, tokenizer)


def _run(
    config: Config,
    task: Task,
    mesh: Mesh,
    datasets: Datasets,
    started: float,
    write_sample: WriteSample | None = None,
) -> ExitCode:
    log = log_on_rank_zero(mesh.rank)
    engine = build_engine(config, task, mesh)
    _describe(engine, log)
    for note in datasets.notes:
        log(note)
    order = on_every_rank(mesh, lambda: _data_order(engine, datasets))
    loaded = take_up(engine, order)
    if loaded:
        log(f"{loaded.taken_up.value} {loaded.folder}")
        for note in loaded.notes:
            log(note)
    elif config.checkpoint.load:
        log(f"{config.checkpoint.load} holds no checkpoint: starting afresh")
    last_iteration = _last_iteration(engine)
    last_sample = engine.batch_sizes.after(last_iteration - engine.progress.iteration, engine.progress.consumed_samples)
    _check_data_lasts(engine, datasets, last_iteration, last_sample)
    _describe_batches(engine, check_schedules(engine, last_sample), last_sample, log)
    reporter = Reporter(config, mesh.shape.world_size, mesh.rank == 0, task.term_names, last_iteration, mesh.device)
    instruments = Instruments(engine, reporter, log)
    stopping = Stopping(config, mesh.new_hosts(), started)
    try:
        with Saving(engine, order, reporter, log) as saving:
            return _train(engine, datasets, reporter, instruments, last_iteration, saving, stopping, log, write_sample)
    finally:
        instruments.close()
        reporter.close()


def _last_iteration(engine: Engine) -> int:
    """The step after which the run ends.

    A length in samples counts from where the run is: it holds although batches may have had other sizes before.
    """
    training, progress = engine.config.training, engine.progress
    if training.skip_train:
        return progress.iteration
    if training.train_samples is None:
        return max(training.train_iters, progress.iteration)
    return progress.iteration + engine.batch_sizes.steps_within(training.train_samples, progress.consumed_samples)


def _check_data_lasts(engine: Engine, datasets: Datasets, last_iteration: int, last_sample: int) -> None:
    """Raises ValueError before the first step if the data would end before the run does."""
    training, progress = engine.config.training, engine.progress
    assert training.global_batch_size, "the configuration is resolved"
    if last_iteration == progress.iteration and not training.skip_train:
        return
    needed = {"training": (datasets.train, last_sample)}
    batch = training.global_batch_size
    evaluations = 0
    if training.eval_interval:
        evaluations = last_iteration // training.eval_interval - progress.iteration // training.eval_interval
        evaluations += training.skip_train
    for name, valid in datasets.valid.items():
        first = progress.consumed_valid_samples
        samples = batch if engine.config.data.full_validation else first + evaluations * training.eval_iters * batch
        needed["validation" + (f" ({name})" if name else "")] = valid, samples
    for purpose, (dataset, samples) in needed.items():
        available = _order_of(engine, dataset).num_samples_after(0)
        if available is not None and available < samples:
            raise ValueError(
                f"the {purpose} data has {available} samples, but this run reads up to sample {samples}, counting "
                "those that were consumed before it was resumed: give fewer --train-iters, a weight to each dataset "
                "(those without weights are read once), or the batch size and evaluations of before"
            )


def _train(
    engine: Engine,
    datasets: Datasets,
    reporter: Reporter,
    instruments: Instruments,
    last_iteration: int,
    saving: Saving,
    stopping: Stopping,
    log: Callable[[str], None],
    write_sample: WriteSample | None,
) -> ExitCode:
    progress, eval_interval = engine.progress, engine.config.training.eval_interval
    with ExitStack() as stack:
        batches = stack.enter_context(
            closing(_global_batches(engine, datasets.train, progress.consumed_samples, engine.batch_sizes))
        )
        evaluation = _Evaluation(engine, datasets, stack)
        if progress.evaluation_due:
            evaluation.run(reporter)
        if engine.config.training.skip_train:
            log("nothing is trained, as --skip-train says")
            evaluation.run(reporter)
            evaluation.run_test(reporter)
            return ExitCode.FINISHED
        stack.enter_context(stopping)
        prediction = Prediction(engine) if progress.iteration < last_iteration else None
        if prediction is not None:
            log(str(prediction))
        reporter.start()
        while progress.iteration < last_iteration:
            instruments.begin(progress.iteration + 1)
            with engine.mesh.journal.step():
                with instruments.parts.measure("batch-generator"):
                    micro_batches = next(batches)
                with _watched(prediction, progress.iteration + 1, micro_batches, instruments.passes) as passes:
                    metrics = train_step(engine, micro_batches, passes, instruments.parts)
            done = progress.iteration
            instruments.end(done)
            reporter.step(done, progress.consumed_samples, metrics)
            wish = stopping.after_step(done, saving.seconds)
            is_last = done == last_iteration
            leaving = wish.reason is not None and not is_last
            progress.evaluation_due = bool(eval_interval and done % eval_interval == 0)
            # Who is in a hurry cannot wait for an evaluation; it follows, in the run that goes on if need be.
            if not wish.save and progress.evaluation_due:
                evaluation.run(reporter)
            saving.after_step(now=wish.save, last=is_last or leaving)
            if leaving:
                instruments.flush()
                reporter.flush()
                saving.finish()
                log(f"left after iteration {done}: {wish.reason}")
                return wish.exit_code
            if progress.evaluation_due:
                evaluation.run(reporter)
            sample_interval = engine.config.logging.sample_interval
            if write_sample is not None and sample_interval and done % sample_interval == 0:
                _publish_sample(engine, reporter, write_sample)
            if is_last:
                evaluation.run_test(reporter)
            stopping.pause()
        instruments.flush()
        reporter.flush()
        # Signals stay caught until the last checkpoint is on the disk.
        saving.finish()
    compared = prediction.comparison(reporter) if prediction is not None else None
    if compared:
        log(compared)
    if engine.config.checkpoint.save and not saving.has_saved:
        log(f"nothing was trained and nothing saved: iteration {progress.iteration} is where the run ends")
    return ExitCode.FINISHED


def _watched(
    prediction: Prediction | None, iteration: int, batch: list[Batch], passes: Measures | None
) -> AbstractContextManager[Measures | None]:
    return nullcontext(passes) if prediction is None else prediction.watching(iteration, batch, passes)


def _publish_sample(engine: Engine, reporter: Reporter, write_sample: WriteSample) -> None:
    reporter.flush()
    resume = reporter.pause()
    reporter.sample(engine.progress.iteration, write_sample(engine))
    resume()


class _Evaluation:
    """Evaluates on each validation set, each time where the last evaluation left it; at the end on the test data."""

    def __init__(self, engine: Engine, datasets: Datasets, stack: ExitStack) -> None:
        self._engine, self._datasets = engine, datasets
        self._is_full = engine.config.data.full_validation
        consumed = engine.progress.consumed_valid_samples
        self._batches = {
            name: stack.enter_context(closing(_global_batches(engine, dataset, consumed, self._batch_sizes)))
            for name, dataset in ({} if self._is_full else datasets.valid).items()
        }

    @property
    def _batch_sizes(self) -> BatchSizes:
        size = self._engine.config.training.global_batch_size
        assert size, "the configuration is resolved"
        return BatchSizes.constant(size)

    def run(self, reporter: Reporter) -> None:
        """Reads `--eval-iters` global batches of each set, or all whole ones, and publishes their mean losses."""
        progress, training = self._engine.progress, self._engine.config.training
        for name, dataset in self._datasets.valid.items():
            if self._is_full:
                with closing(_global_batches(self._engine, dataset, 0, self._batch_sizes, "single")) as batches:
                    self._publish(reporter, batches, len(dataset) // self._batch_sizes.at(0), name)
            else:
                self._publish(reporter, self._batches[name], training.eval_iters, name)
        if not self._is_full:
            progress.consumed_valid_samples += training.eval_iters * self._batch_sizes.at(0)
        progress.evaluation_due = False

    def run_test(self, reporter: Reporter) -> None:
        """The same on the test data, if there is some; on less where there is less."""
        test = self._datasets.test
        if test is not None:
            num_batches = min(self._engine.config.training.eval_iters, len(test) // self._batch_sizes.at(0))
            with closing(_global_batches(self._engine, test, 0, self._batch_sizes, "single")) as batches:
                self._publish(reporter, batches, num_batches, "", test=True)

    def _publish(
        self, reporter: Reporter, batches: Iterator[list[Batch]], num_batches: int, name: str, *, test: bool = False
    ) -> None:
        engine = self._engine
        reporter.flush()
        resume = reporter.pause()
        num_terms = len(engine.task.term_names)
        totals = torch.zeros((2, num_terms), dtype=torch.float64, device=engine.mesh.device)
        for _ in range(num_batches):
            totals += torch.stack(evaluate_step(engine, next(batches)))
        losses = mean_losses(totals[0], totals[1], engine.task.term_names)
        progress = engine.progress
        reporter.evaluation(progress.iteration, progress.consumed_samples, losses, name, test=test)
        resume()


def _global_batches(
    engine: Engine, dataset: SampleSource, consumed_samples: int, batch_sizes: BatchSizes, order: str | None = None
) -> Generator[list[Batch], None, None]:
    """This rank's micro-batches of one global batch after another, on the device; `_check_data_lasts` saw the end."""
    device, num_workers = engine.mesh.device, engine.config.data.num_workers
    if num_workers is None:
        # Without a GPU the processes would take their time from the training.
        num_workers = 2 if device.type == "cuda" else 0
    sampler = GlobalBatchSampler(_order_of(engine, dataset, order), consumed_samples, batch_sizes, engine.data_share)
    with closing(build_loader(dataset, sampler, num_workers, pin_memory=device.type == "cuda")) as loader:
        for micro_batches in loader:
            yield [
                {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
                for micro_batch in micro_batches
            ]


def _data_order(engine: Engine, datasets: Datasets) -> dict[str, str]:
    wanted = train_samples(engine.config, engine.batch_sizes)
    share, tokenizer, content = engine.data_share, datasets.tokenizer, datasets.content
    return data_order(engine.config, wanted, len(datasets.train), share, tokenizer, content)


def _order_of(engine: Engine, dataset: SampleSource, kind: str | None = None) -> SampleOrder:
    data = engine.config.data
    return build_order(kind or data.dataloader_type, len(dataset), engine.data_share, sharding=data.data_sharding)


def _describe(engine: Engine, log: Callable[[str], None]) -> None:
    """One paragraph before the first step: what runs, in which layout, under which schedule."""
    shape, config = engine.mesh.shape, engine.config
    count = parameter_count(config.model).total
    layers = [len(layers) for layers in engine.layers.values()]
    log(
        f"{count:,} parameters in {config.model.num_layers} layers over {shape.world_size} processes: tensor {shape.tp}"
        f"{' with sequence parallelism' if engine.context.sequence_parallel else ''}, pipeline {shape.pp} with "
        f"{config.parallel.num_virtual_stages_per_pipeline_rank} stages each ({layers} layers on the "
        f"first rank), data {shape.dp}"
        f"{' with the distributed optimizer' if config.parallel.use_distributed_optimizer else ''}, "
        f"{str(engine.context.dtype).removeprefix('torch.')} on {engine.mesh.device.type}"
    )


def _describe_batches(
    engine: Engine, micro_batch_numbers: list[int], last_sample: int, log: Callable[[str], None]
) -> None:
    """How the size of the batch goes on, and the schedules of the steps ahead, the last one's bubble with them."""
    if not micro_batch_numbers:
        return
    consumed = engine.progress.consumed_samples
    sizes = engine.batch_sizes.sizes_within(last_sample, consumed)
    if len(sizes) > 1:
        log(
            f"global batch size {sizes[0]} after {consumed} samples, changing to {sizes[-1]} in {len(sizes) - 1} "
            f"step{'s' if len(sizes) > 2 else ''}"
        )
    lowered = engine.schedule(micro_batch_numbers[-1])
    numbers = " to ".join(str(number) for number in sorted({min(micro_batch_numbers), max(micro_batch_numbers)}))
    log(
        f"schedule {lowered.schedule.name} with {numbers} micro-batches verified; planned bubble "
        f"{simulate(lowered).bubble:.1%} where a backward pass takes twice a forward pass and messages nothing"
    )
