"""The processes of a job: device, backend, groups, and their end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megallm.config import data_parallel_size, resolve
from megallm.config.tree import Config
from megallm.device import select_backend, select_device, use_one_thread_per_process
from megallm.mesh import Mesh, MeshShape, start_processes
from megallm.plan.validate import check
from megallm.train.watch import SECONDS_BEFORE_TORCH, watched


@contextmanager
def joined_processes(config: Config) -> Iterator[tuple[Config, Mesh]]:
    """Checks and resolves a configuration for the processes that torchrun started, or for this one alone, and joins
    them in a mesh.

    Raises ValueError with everything that is wrong, before any process waits for another.
    """
    parallel = config.parallel
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = select_device(config.training.device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        use_one_thread_per_process(local_world_size)
    backend = select_backend(device, local_world_size, parallel.distributed_backend)
    # A hang is told by our own watch; torch's errors come later and say less.
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes, seconds=SECONDS_BEFORE_TORCH)
    rank, world_size = start_processes(backend, device, timeout)
    try:
        shape = MeshShape(
            tp=parallel.tensor_model_parallel_size,
            dp=data_parallel_size(parallel, world_size),
            pp=parallel.pipeline_model_parallel_size,
        )
        mesh = Mesh(shape, rank, device, timeout)
        with watched(mesh, parallel.distributed_timeout_minutes):
            yield resolve(config, world_size), mesh
        # Threads of gloo that still hold a tensor when the interpreter ends abort the process. After an exception
        # messages may be under way that nobody will answer, and waiting for the threads would take for ever.
        mesh.close()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
