"""Garbage collection at set times, alike on all ranks: while one collects by itself, the others wait for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megallm.config.tree import TrainingConfig


class GarbageCollection:
    """What --manual-gc, --manual-gc-interval and --no-manual-gc-eval ask for.

    To be used in a `with` block, within which nothing is collected but where a method says so; after it all is as it
    was. Without --manual-gc nothing changes.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._is_manual = training.manual_gc
        self._interval = training.manual_gc_interval if training.manual_gc else 0
        self._around_evaluation = training.manual_gc and not training.no_manual_gc_eval
        self._was_enabled = False

    def __enter__(self) -> GarbageCollection:
        if self._is_manual:
            self._was_enabled = gc.isenabled()
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            gc.enable()

    def after_step(self, iteration: int) -> None:
        """Collects every so many steps."""
        if self._interval and iteration % self._interval == 0:
            gc.collect()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation: collects everything before it, and what it has made itself after it."""
        if self._around_evaluation:
            gc.collect()
        yield
        if self._around_evaluation:
            gc.collect(generation=0)
