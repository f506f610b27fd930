"""Profiles of chosen steps on chosen ranks (--profile)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from megallm.config.tree import Config
from megallm.mesh import Mesh


class Profiler:
    """Records the steps after --profile-step-start up to --profile-step-end.

    With --use-pytorch-profiler, and wherever there is no GPU, torch's profiler writes a trace for Chrome or Perfetto,
    one file a rank. Otherwise CUDA's profiler is switched on for a program that watches, such as `nsys profile
    --capture-range cudaProfilerApi`, and sees NVTX ranges. Parts of a step, and each forward and backward pass, are
    ranges of either.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        logging = config.logging
        ranks = {int(rank) for rank in logging.profile_ranks} or {0}
        self._is_on = logging.profile and mesh.rank in ranks
        self._first, self._last = logging.profile_step_start + 1, logging.profile_step_end
        self._cuda = mesh.device.type == "cuda"
        self._traces = logging.use_pytorch_profiler or not self._cuda
        folder = Path(logging.tensorboard_dir or config.checkpoint.save or ".")
        self._file = folder / f"profile.steps{self._first}-{self._last}.rank{mesh.rank}.json.gz"
        self._running: ExitStack | None = None

    def before_step(self, iteration: int) -> bool:
        """Starts recording where `iteration` is the first step to be seen. Returns whether this step is recorded."""
        if self._is_on and self._running is None and self._first <= iteration <= self._last:
            self._running = ExitStack()
            self._running.enter_context(self._trace() if self._traces else _watched_by_cuda())
        return self._running is not None

    def after_step(self, iteration: int) -> str | None:
        """Stops after the last step. Returns a sentence for the log then."""
        if self._running is None or iteration < self._last:
            return None
        self.close()
        return f"profile of steps {self._first} to {self._last}: {self._file if self._traces else 'recorded'}"

    def close(self) -> None:
        """Stops recording if the run ends within the steps to be seen."""
        if self._running is not None:
            running, self._running = self._running, None
            running.close()

    @contextmanager
    def _trace(self) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            yield
        self._file.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self._file))


@contextmanager
def _watched_by_cuda() -> Iterator[None]:
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx(record_shapes=True):
        yield


class Ranges:
    """Measures nothing, but names what is done within for a profiler: an NVTX range, or a range of torch's."""

    @contextmanager
    def measure(self, label: Any) -> Iterator[None]:
        with torch.profiler.record_function(str(label)):
            yield
