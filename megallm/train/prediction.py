"""What was predicted of a run beside what was measured: step time, bubble, memory.

One step, the second of the job, is watched: the time of every forward and backward pass, and the memory at its peak.
On a GPU that is what torch's allocator gave out. On a CPU it is a count of tensors: weights, gradients and optimizer,
what autograd keeps, messages and batch; what an operator needs for itself in passing is in neither number there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from megallm.config.operators import parse_choices
from megallm.config.tree import Config
from megallm.device import Measures, Stopwatch, Together
from megallm.mesh import Mesh
from megallm.ops.library import operators_in_use
from megallm.plan.gpus import Gpu
from megallm.plan.memory import memory_of_rank
from megallm.plan.report import gib, seconds, table
from megallm.plan.stages import Layout
from megallm.plan.timing import StepTime, step_time
from megallm.train.calibration import measured_rates
from megallm.train.engine import Engine
from megallm.train.metrics import Reporter
from megallm.train.saved_bytes import SavedBytes
from megallm.train.step import Batch

_WATCHED = 2
_KINDS = "predicted", "measured"
# Kinds of memory that torch's allocator does not give out, and those that are not tensors one could count on a CPU.
_OUTSIDE = ("communicators",)
_IN_PASSING = ("communicators", "working memory")


@dataclass
class _Watched:
    """What was seen of the watched step."""

    stopwatch: Stopwatch
    bytes: int


def layout_here(config: Config, mesh: Mesh) -> Layout:
    """A resolved configuration on the processes of this run, with the operators that its devices have."""
    ops = operators_in_use(parse_choices(config.training.ops), mesh.device)
    config = replace(config, training=replace(config.training, ops=ops))
    return Layout(config, mesh.shape.world_size, mesh.device.type == "cuda")


class Prediction:
    """The plan of the run on this device, and what the watched step shows of it. Made by all ranks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        config, progress = engine.config, engine.progress
        self._iteration = progress.iteration + _WATCHED
        before = engine.batch_sizes.after(_WATCHED - 1, progress.consumed_samples)
        self.batch_size = engine.batch_sizes.at(before)
        training = replace(config.training, global_batch_size=self.batch_size)
        on_gpu = engine.mesh.device.type == "cuda"
        self.layout = layout_here(replace(config, training=training), engine.mesh)
        sizes, inner = self.layout.sizes, config.model.ffn_hidden_size
        assert inner, "the configuration is resolved"
        self.device: Gpu = measured_rates(
            engine.mesh, engine.context.dtype, sizes.tokens, config.model.hidden_size, inner // self.layout.tensor
        )
        lowered = engine.schedule(self.layout.num_micro_batches)
        left_out = _OUTSIDE if on_gpu else _IN_PASSING
        self.memory = memory_of_rank(self.layout, engine.mesh.pp.rank, lowered, with_passing=on_gpu)
        self.bytes = sum(size for kind, size in self.memory.items() if kind not in left_out)
        self.step: StepTime = step_time(self.layout, self.device, lowered)
        self._watched: _Watched | None = None

    def __str__(self) -> str:
        bubble = f", of which {self.step.bubble:.1%} bubble" if self.layout.pipeline > 1 else ""
        return (
            f"predicted: {seconds(self.step.total)} a step{bubble}, {gib(self.bytes)} on the first rank, by "
            "rates that were measured now"
        )

    @contextmanager
    def watching(self, iteration: int, batch: Sequence[Batch], passes: Measures | None) -> Iterator[Measures | None]:
        """Around a step; gives what measures its passes: `passes`, and in the watched step a stopwatch with it.

        Waits for nothing when the step is over.
        """
        if iteration != self._iteration:
            yield passes
            return
        engine, device = self._engine, self._engine.mesh.device
        engine.mesh.world.barrier()
        stopwatch = Stopwatch(device)
        measures = stopwatch if passes is None else Together(passes, stopwatch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            yield measures
            self._watched = _Watched(stopwatch, torch.cuda.max_memory_allocated(device))
            return
        modules = [tensor for chunk in engine.chunks.values() for tensor in (*chunk.parameters(), *chunk.buffers())]
        present = [tensor for micro_batch in batch for tensor in micro_batch.values()]
        present += engine.executor.receive_buffers()
        with SavedBytes(modules + present) as saved:
            yield measures
        tables = [tensor for chunk in engine.chunks.values() for tensor in chunk.buffers()]
        self._watched = _Watched(stopwatch, saved.peak + _bytes(present + tables + _state(engine)))

    def comparison(self, reporter: Reporter) -> str | None:
        """The table of predicted and measured values, the same on all ranks, which call it together; None where the
        run ended before the step that is watched. The values also go where the scalars go."""
        if self._watched is None:
            return None
        mesh = self._engine.mesh
        spans = self._watched.stopwatch.spans()
        first = min((begin for _, begin, _ in spans), default=0.0)
        last = max((end for _, _, end in spans), default=0.0)
        busy = sum(end - begin for _, begin, end in spans)
        sums = torch.tensor([busy], dtype=torch.float64, device=mesh.device)
        extremes = torch.tensor([last, -first], dtype=torch.float64, device=mesh.device)
        mesh.pp.all_reduce(sums)
        mesh.pp.all_reduce(extremes, "max")
        time, used = float(extremes.sum()), torch.tensor([self.bytes, self._watched.bytes], device=mesh.device)
        mesh.world.all_reduce(used, "max")
        step = reporter.median_seconds(self.batch_size)
        rows = [("", "predicted", "measured", "difference")]
        values: dict[str, tuple[float, float]] = {}
        if step is not None:
            values["step_seconds"] = self.step.total, step
            rows.append(_row("step time", self.step.total, step, seconds))
        if self.layout.pipeline > 1 and time > 0:
            bubble = 1.0 - float(sums) / (self.layout.pipeline * time)
            values["bubble"] = self.step.bubble, bubble
            points = 100 * (self.step.bubble - bubble)
            rows.append(("bubble", f"{self.step.bubble:.1%}", f"{bubble:.1%}", f"{points:+.1f} points"))
        predicted, measured = used.tolist()
        values["memory_bytes"] = predicted, measured
        rows.append(_row(f"memory ({'allocated' if self.layout.on_gpu else 'tensors'})", predicted, measured, gib))
        named = {
            f"{kind}_{name}": value for name, pair in values.items() for kind, value in zip(_KINDS, pair, strict=True)
        }
        reporter.write(self._engine.progress.iteration, named)
        return "\n".join(["predicted and measured", *(f"    {line}" for line in table(rows, "<>>>"))])


def _row(name: str, predicted: float, measured: float, text: Callable[[float], str]) -> tuple[str, str, str, str]:
    return name, text(predicted), text(measured), f"{predicted / measured - 1:+.1%}"


def _state(engine: Engine) -> list[torch.Tensor]:
    """Weights, gradients, master weights and moments."""
    tensors = [tensor for bucket in engine.reducer.buckets for tensor in (bucket.weights, bucket.gradient)]
    for shard in engine.optimizer.shards:
        tensors += [shard.master, *shard.state.moments().values()]
    return tensors


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Of the storages behind tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
