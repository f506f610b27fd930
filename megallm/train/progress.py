"""The file progress.txt beside the checkpoints (--log-progress): one line for each job that starts and each save."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megallm.config.tree import Config
from megallm.mesh import Mesh
from megallm.plan.flops import flops_per_token
from megallm.train.engine import Progress


class ProgressFile:
    """Appends to `progress.txt` in the --save folder, in Megatron's form; does nothing where nobody asks for it.

    Made once it is known where the run stands: the job then starts.

    Throughputs are TFLOP/s per process with causal attention counted half: those of this job, pauses included.
    """

    def __init__(self, config: Config, mesh: Mesh, progress: Progress) -> None:
        self._path = None
        if config.logging.log_progress and config.checkpoint.save and mesh.rank == 0:
            self._path = Path(config.checkpoint.save) / "progress.txt"
        self._world_size = mesh.shape.world_size
        self._seq_length = config.data.seq_length
        self._flops_per_sample = flops_per_token(config.model, config.data.seq_length).half * config.data.seq_length
        self._first_sample, self._started = progress.consumed_samples, time.perf_counter()
        self._append(f"Starting job\tIteration: {progress.iteration}")

    def saved(self, iteration: int, consumed_samples: int) -> None:
        """A checkpoint is on the disk."""
        seconds = time.perf_counter() - self._started
        operations = (consumed_samples - self._first_sample) * self._flops_per_sample
        self._append(
            f"Saved checkpoint\tIteration: {iteration}\t"
            f"Job throughput: {operations / seconds / self._world_size / 1e12:.4g} TFLOP/s/GPU\t"
            f"Floating-point operations: {consumed_samples * self._flops_per_sample:.2e}\t"
            f"Tokens (in billions): {consumed_samples * self._seq_length / 1e9:.2f}"
        )

    def _append(self, text: str) -> None:
        if self._path is not None:
            job = os.environ.get("SLURM_JOB_ID", "")
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            with self._path.open("a") as file:
                file.write(f"{stamp}\tJob ID: {job}\t# GPUs: {self._world_size}\t{text}\n")
