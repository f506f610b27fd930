"""The processes of a job: device, backend, groups, and their end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megallm.agreement import told_by_the_first
from megallm.config import data_parallel_size, from_dict, resolve, to_dict
from megallm.config.report import warn_once
from megallm.config.tree import Config
from megallm.device import (
    compute_deterministically,
    keep_freed_memory,
    select_backend,
    select_device,
    use_one_thread_per_process,
)
from megallm.mesh import Hosts, Mesh, MeshShape, start_processes
from megallm.plan.validate import check
from megallm.train.saved_arguments import with_model_of_files
from megallm.train.watch import SECONDS_BEFORE_TORCH, watched


@contextmanager
def joined_processes(config: Config) -> Iterator[tuple[Config, Mesh]]:
    """Checks and resolves a configuration for the processes that torchrun started, or for this one alone, and joins
    them in a mesh.

    Raises ValueError with everything that is wrong, before any process waits for another; where the model is in files,
    once one process has read them, on all alike.
    """
    parallel = config.parallel
    if not config.checkpoint.gives_model:
        check(config, int(os.environ.get("WORLD_SIZE", "1")))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if config.training.deterministic_mode:
        compute_deterministically()
    device = select_device(config.training.device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        use_one_thread_per_process(local_world_size)
        keep_freed_memory()
    backend = select_backend(device, local_world_size, parallel.distributed_backend)
    # A hang is told by our own watch; torch's errors come later and say less.
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes, seconds=SECONDS_BEFORE_TORCH)
    rank, world_size = start_processes(backend, device, timeout)
    try:
        if config.checkpoint.gives_model:
            config = _with_model_of_files(config, Hosts.joined(rank, world_size, device))
            check(config, world_size)
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


def _with_model_of_files(config: Config, hosts: Hosts) -> Config:
    """What one machine sees in a folder, another may not, or not yet: the first rank decides."""

    def read() -> str:
        settled, notes = with_model_of_files(config)
        warn_once(os.path.basename(sys.argv[0]), notes)
        return json.dumps(to_dict(settled))

    return from_dict(json.loads(told_by_the_first(hosts, read)))
