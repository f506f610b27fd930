"""What is measured of the steps while they run: the timeline of the pipeline, times of parts, profiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megallm.device import Measures, Stopwatch, Together
from megallm.schedule import Event, Timeline
from megallm.train.engine import Engine
from megallm.train.metrics import Reporter
from megallm.train.profiling import Profiler, Ranges
from megallm.train.timing import Timing


class Instruments:
    """All instruments that a configuration asks for, for one run.

    Before each step `begin` says what measures it; `end` closes it. `flush` and `close` as those of `Reporter`.
    Attributes: `passes`, which measures each forward and backward pass of the step that runs, or None; `parts`, which
    measures the parts of that step.
    """

    def __init__(self, engine: Engine, reporter: Reporter, log: Callable[[str], None]) -> None:
        logging = engine.config.logging
        self._engine, self._log = engine, log
        publish = reporter.write if logging.log_timers_to_tensorboard else lambda iteration, scalars: None
        self._timing = Timing(logging, engine.mesh, log, publish)
        self._profiler = Profiler(engine.config, engine.mesh)
        self._timeline: Stopwatch | None = None
        self.passes: Measures | None = None
        self.parts: Measures = Together()

    def begin(self, iteration: int) -> None:
        """Step number `iteration` is about to begin. Called by all ranks."""
        logging = self._engine.config.logging
        self._timeline = None
        if logging.timeline and iteration == logging.timeline_step:
            self._engine.mesh.world.barrier()
            self._timeline = Stopwatch(self._engine.mesh.device)
        timer = self._timing.begin()
        everything: list[Measures] = [Ranges()] if self._profiler.before_step(iteration) else []
        timers = [] if timer is None else [timer]
        passes = [*everything, *(timers if self._timing.measures_passes else [])]
        if self._timeline is not None:
            passes.append(self._timeline)
        self.passes = Together(*passes) if passes else None
        self.parts = Together(*everything, *timers)

    def end(self, iteration: int) -> None:
        """The step is over. Called by all ranks."""
        if self._timeline is not None:
            self._write_timeline(self._timeline)
        self._timing.end(iteration)
        said = self._profiler.after_step(iteration)
        if said:
            self._log(said)

    def flush(self) -> None:
        """Tells what is still to be told. Called by all ranks, before an evaluation, a save and the end."""
        self._timing.flush()

    def close(self) -> None:
        """Ends what still records."""
        self._profiler.close()

    def _write_timeline(self, stopwatch: Stopwatch) -> None:
        """The first pipeline's ranks write what they measured, each into its own file."""
        mesh = self._engine.mesh
        if mesh.coordinates["tp"] or mesh.coordinates["dp"]:
            return
        path = Path(f"{self._engine.config.logging.timeline}.rank{mesh.pp.rank}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        events = tuple(Event(mesh.pp.rank, *span) for span in stopwatch.spans())
        path.write_text(Timeline("measured", events, "s").to_json())
