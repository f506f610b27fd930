"""A standing pool of processes for tests that need several ranks.

Starting eight Python processes with torch takes seconds, so that one set of workers serves all tests of a session.
Each job gets process groups of its own. When a job fails or hangs, the whole pool is replaced, since the other workers
may be stuck in a message.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["torch", "torch.distributed", "megallm.train.step", "megallm.train.resume", "megallm.train.tasks.gpt"]


class WorkerPool:
    """Runs `function(rank, *arguments)` on the first `world_size` workers, each with gloo set up."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._jobs = 0
        self._store: dist.TCPStore | None = None
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """Results in rank order. Raises RuntimeError with the first failing worker's traceback, or TimeoutError."""
        assert world_size <= self.size, f"the pool has {self.size} workers"
        if not self._workers:
            self._start()
        assert self._store is not None
        self._jobs += 1
        for rank in range(world_size):
            self._workers[rank][1].send((rank, world_size, self._store.port, self._jobs, timeout, function, arguments))
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        results: list[Any] = [None] * world_size
        end = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(waiting.values())} gave no result within {timeout} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    succeeded, value = connection.recv()
                except EOFError:
                    succeeded, value = False, "the process died"
                if not succeeded:
                    self.close()
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return results

    def close(self) -> None:
        """Ends all workers; the next job starts new ones."""
        for process, _ in self._workers:
            process.kill()
        for process, connection in self._workers:
            process.join()
            connection.close()
        self._workers = []
        self._store = None

    def _start(self) -> None:
        # A server process that has only imported forks the workers: they start at once and inherit no threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _work(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, port, job, timeout, function, arguments = connection.recv()
        except EOFError:
            return
        try:
            if world_size > 1:
                store = dist.PrefixStore(str(job), dist.TCPStore("127.0.0.1", port, is_master=False))
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
                )
            connection.send((True, function(rank, *arguments)))
            if world_size > 1:
                dist.destroy_process_group()
        except BaseException:
            connection.send((False, traceback.format_exc()))
            return
