"""Saving while training goes on: a copy in the host's memory, written by a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.retention import Retention
from megallm.checkpoint.save import Saved, save_checkpoint
from megallm.device import HostCopies
from megallm.mesh import Hosts


class BackgroundSaver:
    """Writes one checkpoint after another, each from a copy of what is saved; at most one is under way.

    `finished` is called in the thread, on every rank, with the outcome (a ValueError where the save failed) and the
    seconds since its start.
    """

    def __init__(self, hosts: Hosts, finished: Callable[[Saved | ValueError, float], None]) -> None:
        self._hosts = hosts
        self._finished = finished
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Saved | ValueError] | None = None

    def start(
        self, root: str, iteration: int, boxes: Sequence[LocalBox], state: dict[str, Any], retention: Retention
    ) -> None:
        """Returns when the boxes' tensors may change; waits for the save before, whose copies it overwrites.

        Called by all ranks, with the same shapes each time.
        """
        self.wait()
        copies = self._copies.take([box.tensor for box in boxes])
        frozen = [replace(box, tensor=copy) for box, copy in zip(boxes, copies, strict=True)]
        self._pending = self._thread.submit(self._save, root, iteration, frozen, state, retention)

    def wait(self) -> Saved | ValueError | None:
        """Returns when no save is under way, with the outcome of the last one that was not asked for yet."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Waits for the save under way and ends the thread."""
        self._thread.shutdown(wait=True)

    def _save(
        self, root: str, iteration: int, boxes: list[LocalBox], state: dict[str, Any], retention: Retention
    ) -> Saved | ValueError:
        begin = time.perf_counter()
        outcome: Saved | ValueError
        try:
            outcome = save_checkpoint(root, iteration, boxes, state, self._hosts, retention)
        except ValueError as error:
            outcome = error
        self._finished(outcome, time.perf_counter() - begin)
        return outcome
