"""A job in which a process has died or hangs ends at once on all ranks, each telling what it was about."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megallm.journal import CommunicationError, Journal, stack_of_main_thread
from megallm.mesh import Mesh
from megallm.train.stopping import ExitCode

# The launcher ends all processes as soon as it sees one that has ended. So long it has to see first the one that was
# the cause;
_SECONDS_FOR_THE_LAUNCHER = 2.0
# and so long the others have to report too, who may have begun to wait a little later.
_SECONDS_FOR_REPORTS = 10.0
# torch gives up on a message this much later: its errors do not say what hung.
SECONDS_BEFORE_TORCH = 30.0
_MOST_SECONDS_BETWEEN_LOOKS = 5.0


class Watch:
    """Ends this process when it makes no progress for `seconds`.

    That is when a message takes longer, or, within a step, when none begins or comes to its end. A thread looks, a few
    times within the limit.
    """

    def __init__(self, mesh: Mesh, seconds: float) -> None:
        self._journal, self._rank, self._seconds = mesh.journal, mesh.rank, seconds
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if mesh.shape.world_size > 1:
            self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the watch."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(min(_MOST_SECONDS_BETWEEN_LOOKS, self._seconds / 20)):
            since = [operation.since for operation in self._journal.waiting()]
            if self._journal.stepping:
                since.append(self._journal.activity)
            if since and time.monotonic() - min(since) > self._seconds:
                _leave(self._rank, hang_report(self._journal, self._seconds), _SECONDS_FOR_REPORTS)


def hang_report(journal: Journal, seconds: float) -> str:
    """What this process waits for, its last message of each group, and where its main thread is."""
    now = time.monotonic()
    lines = [f"no progress for {seconds / 60:g} minutes, the limit of --distributed-timeout-minutes"]
    waiting = journal.waiting()
    lines += [f"  waits for {now - operation.since:.0f} s in {operation}" for operation in waiting]
    if not waiting:
        lines.append("  waits in no message: the others wait for this process")
    for operation in journal.last():
        if operation not in waiting:
            lines.append(f"  last of its group: {operation}")
    lines += [f"  main thread: {place}" for place in stack_of_main_thread()]
    return "\n".join(lines)


@contextmanager
def watched(mesh: Mesh, minutes: float) -> Iterator[None]:
    """Watches over the processes of a mesh within it. Leaves the program where another process is gone.

    Of a defect of this process the launcher is told the traceback, for its last lines.
    """
    watch = Watch(mesh, 60.0 * minutes)
    try:
        yield
    except CommunicationError as error:
        _leave(
            mesh.rank, f"{error}\n  Another process has ended or cannot be reached: the launcher tells which one first"
        )
    except Exception as error:
        if not isinstance(error, ValueError):
            get_error_handler().record_exception(error)
        raise
    finally:
        watch.close()


def _leave(rank: int, text: str, seconds: float = _SECONDS_FOR_THE_LAUNCHER) -> None:
    """Prints and ends the process after `seconds`, in no orderly way: that would wait for the others."""
    print(f"rank {rank} on {socket.gethostname()}: {text}", file=sys.stderr, flush=True)
    time.sleep(seconds)
    os._exit(ExitCode.LOST)
