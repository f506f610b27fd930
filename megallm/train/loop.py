"""The run: from a configuration to a trained model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path

from megallm.agreement import on_every_rank
from megallm.config.report import counted
from megallm.config.resolve import train_samples
from megallm.config.tree import Config
from megallm.device import Measures
from megallm.file_lock import own_folder
from megallm.mesh import Mesh
from megallm.plan.flops import parameter_count
from megallm.schedule import simulate
from megallm.train.data_order import data_order
from megallm.train.datasets import Datasets, build_datasets, build_tokenizer_of, with_vocabulary
from megallm.train.engine import Engine, build_engine, check_schedules
from megallm.train.evaluation import Evaluation, global_batches, order_of
from megallm.train.garbage import GarbageCollection
from megallm.train.instruments import Instruments
from megallm.train.metrics import Reporter, log_on_rank_zero
from megallm.train.out_of_memory import out_of_memory_explained
from megallm.train.outputs import try_outputs
from megallm.train.prediction import Prediction
from megallm.train.processes import joined_processes
from megallm.train.resume import take_up
from megallm.train.saving import Saving
from megallm.train.step import Batch, train_step
from megallm.train.stopping import NOTHING, Ask, ExitCode, Stopping, Wish
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
    if config.checkpoint.save_hf:
        # Imported where it is needed: most runs start without the converter.
        from megallm.train.hugging_face import check_export

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
        available = order_of(engine, dataset).num_samples_after(0)
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
    progress, training = engine.progress, engine.config.training
    with ExitStack() as stack:
        batches = stack.enter_context(
            closing(global_batches(engine, datasets.train, progress.consumed_samples, engine.batch_sizes))
        )
        evaluation = Evaluation(engine, datasets, stack)
        stack.enter_context(stopping)
        garbage = stack.enter_context(GarbageCollection(training))
        pauses = _Pauses(engine, evaluation, reporter, saving, stopping, garbage, log, write_sample)
        if training.skip_train:
            log("nothing is trained, as --skip-train says")
            wish = pauses.instead_of_training()
            if wish.leaves:
                log(f"left before the end of the evaluation: {wish.reason}")
            return wish.exit_code
        wish = pauses.begin()
        prediction = Prediction(engine) if progress.iteration < last_iteration else None
        if prediction is not None:
            log(str(prediction))
        reporter.start()
        stopping.pause()
        while progress.iteration < last_iteration and not wish.leaves:
            instruments.begin(progress.iteration + 1)
            with engine.mesh.journal.step():
                with instruments.parts.measure("batch-generator"):
                    micro_batches = next(batches)
                with _watched(prediction, progress.iteration + 1, micro_batches, instruments.passes) as passes:
                    metrics = train_step(engine, micro_batches, passes, instruments.parts)
            done = progress.iteration
            instruments.end(done)
            reporter.step(done, progress.consumed_samples, metrics)
            progress.evaluation_due = bool(training.eval_interval and done % training.eval_interval == 0)
            wish = pauses.after_step(is_last=done == last_iteration)
            garbage.after_step(done)
            stopping.pause()
        if progress.iteration == last_iteration and not (wish.leaves and pauses.is_something_left()):
            wish = pauses.end()
        instruments.flush()
        reporter.flush()
        # Signals stay caught until the last checkpoint is on the disk.
        saving.finish()
    compared = prediction.comparison(reporter) if prediction is not None else None
    if compared:
        log(compared)
    if wish.leaves:
        log(f"left after iteration {progress.iteration}: {wish.reason}")
        return wish.exit_code
    if engine.config.checkpoint.save and not saving.has_saved:
        log(f"nothing was trained and nothing saved: iteration {progress.iteration} is where the run ends")
    return ExitCode.FINISHED


class _Pauses:
    """What is done between two steps: evaluations, saves, texts. Each ends early for what asks for that.

    Methods return the wish with which the run is to leave, if it says so.
    """

    def __init__(
        self,
        engine: Engine,
        evaluation: Evaluation,
        reporter: Reporter,
        saving: Saving,
        stopping: Stopping,
        garbage: GarbageCollection,
        log: Callable[[str], None],
        write_sample: WriteSample | None,
    ) -> None:
        self._engine, self._evaluation, self._reporter, self._saving = engine, evaluation, reporter, saving
        self._stopping, self._garbage, self._log, self._write_sample = stopping, garbage, log, write_sample

    def instead_of_training(self) -> Wish:
        """All of a run that trains nothing."""
        self._engine.progress.evaluation_due = True
        wish = self.begin()
        return wish if wish.leaves else self._evaluation.run_test(self._reporter, self._ask_to_leave)

    def begin(self) -> Wish:
        """Before the first step: the evaluation that was put off when the run was left."""
        return self._evaluate_if_due(self._ask_to_leave)

    def after_step(self, *, is_last: bool) -> Wish:
        """After a step. Who is in a hurry waits for no evaluation: it follows, in the run that goes on if need be."""
        progress, saving = self._engine.progress, self._saving
        done, evaluates = progress.iteration, progress.evaluation_due
        # All this comes before the time is looked at again.
        ahead = 0.0 if is_last else saving.expected_seconds(done) + evaluates * self._evaluation.seconds
        wish = self._stopping.after_step(done, saving.seconds, ahead)
        if not wish.save:
            hurry = self._evaluate_if_due(self._ask)
            if hurry.leaves or is_last:
                # At the end --exit-interval asks for nothing more.
                wish = hurry
            elif hurry.save:
                # Where --exit-interval lets the run leave, it still does.
                wish = wish._replace(save=True)
        saved = saving.after_step(now=wish.save, last=is_last or wish.leaves, ask=self._ask_to_leave)
        if saved is not None and saved.leaves and not wish.leaves:
            wish = saved
        if not wish.leaves:
            wish = self._evaluate_if_due(self._ask_to_leave)
        if wish.leaves:
            return wish
        writes = self._write_sample_if_wanted()
        if saved is not None or evaluates or writes:
            # What has come in meanwhile is not kept waiting for another step.
            wish = self._ask() if saved is None else self._ask_to_leave()
            if wish.save:
                saving.after_step(now=True, last=wish.leaves, ask=self._ask_to_leave)
        return wish

    def end(self) -> Wish:
        """After the last step, also where an earlier run has taken it and left before this."""
        wish = self._saving.export_if_missing(self._ask_to_leave)
        return wish if wish.leaves else self._evaluation.run_test(self._reporter, self._ask_to_leave)

    def is_something_left(self) -> bool:
        """Whether a run that has taken its last step has something else to do."""
        return self._engine.progress.evaluation_due or self._evaluation.has_test or self._saving.lacks_export()

    def _ask(self) -> Wish:
        return self._stopping.within_pause(self._saving.seconds, is_saved=False)

    def _ask_to_leave(self) -> Wish:
        return self._stopping.within_pause(self._saving.seconds, is_saved=True)

    def _evaluate_if_due(self, ask: Ask) -> Wish:
        if not self._engine.progress.evaluation_due:
            return NOTHING
        with self._garbage.evaluation():
            wish = self._evaluation.run(self._reporter, ask)
        if wish.save:
            why = wish.reason or "a checkpoint is asked for"
            self._log(f"interrupted the evaluation after iteration {self._engine.progress.iteration}: {why}")
        return wish

    def _write_sample_if_wanted(self) -> bool:
        interval, iteration = self._engine.config.logging.sample_interval, self._engine.progress.iteration
        if self._write_sample is None or not interval or iteration % interval:
            return False
        self._reporter.flush()
        resume = self._reporter.pause()
        self._reporter.sample(iteration, self._write_sample(self._engine))
        resume()
        return True


def _watched(
    prediction: Prediction | None, iteration: int, batch: list[Batch], passes: Measures | None
) -> AbstractContextManager[Measures | None]:
    return nullcontext(passes) if prediction is None else prediction.watching(iteration, batch, passes)


def _data_order(engine: Engine, datasets: Datasets) -> dict[str, str]:
    wanted = train_samples(engine.config, engine.batch_sizes)
    share, tokenizer, content = engine.data_share, datasets.tokenizer, datasets.content
    return data_order(engine.config, wanted, len(datasets.train), share, tokenizer, content, datasets.num_valid_samples)


def _describe(engine: Engine, log: Callable[[str], None]) -> None:
    """One paragraph before the first step: what runs, in which layout, under which schedule."""
    shape, config = engine.mesh.shape, engine.config
    count = parameter_count(config.model).total
    layers = [len(layers) for layers in engine.layers.values()]
    log(
        f"{count:,} parameters in {counted(config.model.num_layers, 'layer')} over "
        f"{counted(shape.world_size, 'process', 'processes')}: tensor {shape.tp}"
        f"{' with sequence parallelism' if engine.context.sequence_parallel else ''}, pipeline {shape.pp} with "
        f"{counted(config.parallel.num_virtual_stages_per_pipeline_rank, 'stage')} each ({layers} layers on the "
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
            f"global batch size {sizes[0]} after {consumed} samples, changing to {sizes[-1]} in "
            f"{counted(len(sizes) - 1, 'step')}"
        )
    lowered = engine.schedule(micro_batch_numbers[-1])
    numbers = " to ".join(str(number) for number in sorted({min(micro_batch_numbers), max(micro_batch_numbers)}))
    log(
        f"schedule {lowered.schedule.name} with {numbers} micro-batch{'' if numbers == '1' else 'es'} verified; "
        f"planned bubble {simulate(lowered).bubble:.1%} where a backward pass takes twice a forward pass "
        "and messages nothing"
    )
