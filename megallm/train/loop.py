"""The run: from a configuration to a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megallm.agreement import on_every_rank
from megallm.config.tree import Config
from megallm.data.feeding.loader import SampleSource, build_loader
from megallm.data.feeding.sampler import GlobalBatchSampler
from megallm.device import Stopwatch
from megallm.mesh import Mesh
from megallm.plan.flops import parameter_count
from megallm.schedule import Event, Timeline, simulate
from megallm.train.datasets import Datasets, build_datasets, build_tokenizer_of, with_vocabulary
from megallm.train.engine import Engine, build_engine
from megallm.train.metrics import Reporter, log_on_rank_zero, mean_losses
from megallm.train.outputs import try_outputs
from megallm.train.processes import joined_processes
from megallm.train.resume import load_engine, save_engine
from megallm.train.step import Batch, evaluate_step, train_step
from megallm.train.tasks.task import Task


def pretrain(config: Config, make_task: Callable[[Config], Task]) -> None:
    """Trains as `config` says, in the processes that torchrun started or in this one alone.

    Raises ValueError, the same on every rank, for a mistake in the configuration or in a file it names.
    """
    with joined_processes(config) as (resolved, mesh):
        config, datasets = on_every_rank(mesh, lambda: _read_files(resolved, mesh.shape.world_size))
        _run(config, make_task(config), mesh, datasets)


def _read_files(config: Config, world_size: int) -> tuple[Config, Datasets]:
    tokenizer = build_tokenizer_of(config)
    config = with_vocabulary(config, tokenizer, world_size)
    return config, build_datasets(config, tokenizer)


def _run(config: Config, task: Task, mesh: Mesh, datasets: Datasets) -> None:
    log = log_on_rank_zero(mesh.rank)
    on_every_rank(mesh, lambda: try_outputs(config) if mesh.rank == 0 else None)
    engine = build_engine(config, task, mesh)
    _describe(engine, log)
    if config.checkpoint.load:
        loaded = load_engine(engine, config.checkpoint.load)
        log(
            f"continuing from {loaded[0]}"
            if loaded
            else f"{config.checkpoint.load} holds no checkpoint: starting afresh"
        )
        for change in loaded[1] if loaded else []:
            log(f"changed since it was saved: {change}")
    _check_data_lasts(engine, datasets)
    reporter = Reporter(config, mesh.shape.world_size, mesh.rank == 0, task.term_names)
    try:
        _train(engine, datasets, reporter, log)
    finally:
        reporter.close()


def _check_data_lasts(engine: Engine, datasets: Datasets) -> None:
    """Raises ValueError before the first step if the data would end before the run does."""
    training, progress = engine.config.training, engine.progress
    assert training.global_batch_size, "the configuration is resolved"
    remaining = max(0, training.train_iters - progress.iteration) * training.global_batch_size
    if remaining == 0:
        return
    needed = {"training": (datasets.train, progress.consumed_samples + remaining)}
    if training.eval_interval and datasets.valid is not None:
        evaluations = training.train_iters // training.eval_interval - progress.iteration // training.eval_interval
        samples = max(0, evaluations) * training.eval_iters * training.global_batch_size
        needed["validation"] = (datasets.valid, progress.consumed_valid_samples + samples)
    for purpose, (dataset, samples) in needed.items():
        if len(dataset) < samples:
            raise ValueError(
                f"the {purpose} data has {len(dataset)} samples, but this run reads up to sample {samples}, counting "
                "those that were consumed before it was resumed: keep the batch size and the flags of the evaluation "
                "as they were, or give fewer --train-iters"
            )


def _train(engine: Engine, datasets: Datasets, reporter: Reporter, log: Callable[[str], None]) -> None:
    config, progress = engine.config, engine.progress
    training, checkpoint = config.training, config.checkpoint
    batches = _global_batches(engine, datasets.train, progress.consumed_samples, "training")
    last_saved = -1
    reporter.start()
    while progress.iteration < training.train_iters:
        stopwatch = _stopwatch(engine, progress.iteration + 1)
        metrics = train_step(engine, next(batches), stopwatch)
        if stopwatch is not None:
            _write_timeline(engine, stopwatch)
        reporter.step(progress.iteration, progress.consumed_samples, metrics)
        done = progress.iteration
        if training.eval_interval and done % training.eval_interval == 0 and datasets.valid is not None:
            _evaluate(engine, datasets, reporter)
        leaving = training.exit_interval is not None and done % training.exit_interval == 0
        due = checkpoint.save_interval is not None and done % checkpoint.save_interval == 0
        if checkpoint.save and (due or leaving or done == training.train_iters):
            reporter.flush()
            resume = reporter.pause()
            log(f"saved {save_engine(engine, checkpoint.save)}")
            last_saved = done
            resume()
        if leaving and done < training.train_iters:
            reporter.flush()
            log(f"left after iteration {done}, which --exit-interval {training.exit_interval} divides")
            return
    reporter.flush()
    if checkpoint.save and last_saved < 0:
        log(f"nothing was trained and nothing saved: iteration {progress.iteration} is where the run ends")


def _evaluate(engine: Engine, datasets: Datasets, reporter: Reporter) -> None:
    assert datasets.valid is not None, "there is validation data"
    reporter.flush()
    resume = reporter.pause()
    progress, training = engine.progress, engine.config.training
    batches = _global_batches(engine, datasets.valid, progress.consumed_valid_samples, "validation")
    num_terms = len(engine.task.term_names)
    totals = torch.zeros((2, num_terms), dtype=torch.float64, device=engine.mesh.device)
    for _ in range(training.eval_iters):
        totals += torch.stack(evaluate_step(engine, next(batches)))
        assert training.global_batch_size, "the configuration is resolved"
        progress.consumed_valid_samples += training.global_batch_size
    losses = mean_losses(totals[0], totals[1], engine.task.term_names)
    reporter.validation(progress.iteration, progress.consumed_samples, losses)
    resume()


def _global_batches(
    engine: Engine, dataset: SampleSource, consumed_samples: int, purpose: str
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of one global batch after another, on the device."""
    config, mesh = engine.config, engine.mesh
    assert config.training.global_batch_size, "the configuration is resolved"
    sampler = GlobalBatchSampler(
        num_samples=len(dataset),
        consumed_samples=consumed_samples,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=mesh.coordinates["dp"],
        data_parallel_size=mesh.shape.dp,
    )
    loader = build_loader(dataset, sampler, num_workers=config.data.num_workers, pin_memory=mesh.device.type == "cuda")
    for micro_batches in loader:
        yield [
            {name: tensor.to(mesh.device, non_blocking=True) for name, tensor in micro_batch.items()}
            for micro_batch in micro_batches
        ]
    raise ValueError(
        f"the {purpose} data ended after {consumed_samples} consumed samples and "
        f"{len(sampler)} further global batches of {config.training.global_batch_size}"
    )


def _describe(engine: Engine, log: Callable[[str], None]) -> None:
    """One paragraph before the first step: what runs, in which layout, under which schedule."""
    shape, config = engine.mesh.shape, engine.config
    count = parameter_count(config.model).total
    layers = [len(layers) for layers in engine.layers.values()]
    lowered = engine.schedule(engine.num_micro_batches)
    bubble = simulate(lowered).bubble
    log(
        f"{count:,} parameters in {config.model.num_layers} layers over {shape.world_size} processes: tensor {shape.tp}"
        f"{' with sequence parallelism' if engine.context.sequence_parallel else ''}, pipeline {shape.pp} with "
        f"{config.parallel.num_virtual_stages_per_pipeline_rank} stages each ({layers} layers on the "
        f"first rank), data {shape.dp}"
        f"{' with the distributed optimizer' if config.parallel.use_distributed_optimizer else ''}, "
        f"{str(engine.context.dtype).removeprefix('torch.')} on {engine.mesh.device.type}"
    )
    log(
        f"schedule {lowered.schedule.name} with {lowered.schedule.num_micro_batches} micro-batches verified; "
        f"planned bubble {bubble:.1%} where a backward pass takes twice a forward pass and messages nothing"
    )


def _stopwatch(engine: Engine, iteration: int) -> Stopwatch | None:
    logging = engine.config.logging
    if not logging.timeline or iteration != logging.timeline_step:
        return None
    engine.mesh.world.barrier()
    return Stopwatch(engine.mesh.device)


def _write_timeline(engine: Engine, stopwatch: Stopwatch) -> None:
    """The first pipeline's ranks write what they measured, each into its own file."""
    mesh = engine.mesh
    if mesh.coordinates["tp"] or mesh.coordinates["dp"]:
        return
    path = Path(f"{engine.config.logging.timeline}.rank{mesh.pp.rank}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    events = tuple(Event(mesh.pp.rank, *span) for span in stopwatch.spans())
    path.write_text(Timeline("measured", events, "s").to_json())
