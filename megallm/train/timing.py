"""How long the parts of the steps take on every rank (--timing-log-level), told at every log line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from megallm.config.tree import LoggingConfig
from megallm.device import Readback, Stopwatch
from megallm.mesh import Mesh
from megallm.schedule import Action, Kind

PARTS = ("batch-generator", "forward-backward", "all-grads-sync", "optimizer")
"""Parts of a step, by Megatron's names."""
PASSES = {Kind.F: "forward-compute", Kind.B: "backward-compute"}
"""At level 2, what the passes of all micro-batches took together."""

Publish = Callable[[int, dict[str, float]], None]


class Timing:
    """Adds up times of parts over the steps between two log lines.

    Times are read one step late and collected from all ranks by a message on the device, so that nothing waits for the
    device within a step. `publish` is given the iteration and the largest time of each part, in seconds a step.
    """

    def __init__(self, logging: LoggingConfig, mesh: Mesh, log: Callable[[str], None], publish: Publish) -> None:
        self._level, self._option, self._interval = (
            logging.timing_log_level,
            logging.timing_log_option,
            logging.log_interval,
        )
        self._mesh, self._log, self._publish = mesh, log, publish
        self._names = PARTS + (tuple(PASSES.values()) if self._level > 1 else ())
        self._current: Stopwatch | None = None
        self._pending: tuple[int, Stopwatch] | None = None
        self._gathered: tuple[int, Readback] | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._num_steps = 0

    @property
    def measures_passes(self) -> bool:
        """Whether single passes are wanted too."""
        return self._level > 1

    def begin(self) -> Stopwatch | None:
        """A stopwatch for the step that begins, or None where nothing is to be measured."""
        if self._level > 0:
            self._current = Stopwatch(self._mesh.device)
        return self._current

    def end(self, iteration: int) -> None:
        """The step is over. Called by all ranks."""
        if self._current is None:
            return
        self._tell()
        self._take_pending()
        self._pending = iteration, self._current

    def flush(self) -> None:
        """Tells what is still to be told. Called by all ranks, before a pause and at the end."""
        self._tell()
        self._take_pending()
        self._tell()

    def _take_pending(self) -> None:
        if self._pending is None:
            return
        (iteration, stopwatch), self._pending = self._pending, None
        for label, begin, end in stopwatch.spans():
            self._seconds[PASSES[label.kind] if isinstance(label, Action) else label] += end - begin
        self._num_steps += 1
        if iteration % self._interval == 0:
            means = [self._seconds[name] / self._num_steps for name in self._names]
            # Pinned, the copy to a GPU waits for nothing.
            mine = torch.tensor(means, dtype=torch.float64, pin_memory=self._mesh.device.type == "cuda")
            mine = mine.to(self._mesh.device, non_blocking=True)
            everyone = mine.new_empty(self._mesh.shape.world_size * len(means))
            self._mesh.world.all_gather(everyone, mine)
            self._gathered = iteration, Readback(everyone)
            self._seconds.clear()
            self._num_steps = 0

    def _tell(self) -> None:
        if self._gathered is None:
            return
        (iteration, readback), self._gathered = self._gathered, None
        if self._mesh.rank != 0:
            return
        values, count = readback.values(), len(self._names)
        by_name = {name: values[number::count] for number, name in enumerate(self._names)}
        self._log(f"iteration {iteration}, {format_times(by_name, self._option)}")
        self._publish(iteration, {f"{name}-time": max(times) for name, times in by_name.items()})


def format_times(by_name: dict[str, list[float]], option: str) -> str:
    """Times of all ranks in seconds as lines in milliseconds, in Megatron's form for max, minmax or all."""
    heads = {
        "max": "max time across ranks (ms):",
        "minmax": "(min, max) time across ranks (ms):",
        "all": "times across ranks (ms):",
    }
    lines = [heads[option]]
    for name, seconds in by_name.items():
        times = [1e3 * second for second in seconds]
        if option == "all":
            lines.append(f"    {name}:")
            lines += [f"       rank {rank:2d}: {time:.2f}" for rank, time in enumerate(times)]
        else:
            what = f"{max(times):.2f}" if option == "max" else f"({min(times):.2f}, {max(times):.2f})"
            lines.append(f"    {name.ljust(35, '.')}: {what}")
    return "\n".join(lines)
