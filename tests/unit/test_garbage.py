"""Garbage is collected when the flags say so, and at no other time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from megallm.config.tree import TrainingConfig
from megallm.train.garbage import GarbageCollection


class Node:
    """Refers to itself: only a collection finds that it is gone."""

    def __init__(self) -> None:
        self.myself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.enable()


def dropped() -> weakref.ReferenceType[Node]:
    return weakref.ref(Node())


@pytest.mark.slow
def test_every_so_many_steps_and_around_evaluations() -> None:
    with GarbageCollection(TrainingConfig(manual_gc=True, manual_gc_interval=3)) as collection:
        assert not gc.isenabled()
        node = dropped()
        collection.after_step(4)
        assert node() is not None
        collection.after_step(6)
        assert node() is None
        before = dropped()
        with collection.evaluation():
            assert before() is None
            within = dropped()
            assert within() is not None
        assert within() is None
    assert gc.isenabled()


def test_no_interval_and_no_evaluation() -> None:
    with GarbageCollection(TrainingConfig(manual_gc=True, no_manual_gc_eval=True)) as collection:
        node = dropped()
        collection.after_step(1)
        with collection.evaluation():
            pass
        assert node() is not None


def test_python_collects_by_itself_otherwise() -> None:
    with GarbageCollection(TrainingConfig(manual_gc_interval=1)) as collection:
        assert gc.isenabled()
        node = dropped()
        gc.disable()
        collection.after_step(1)
        with collection.evaluation():
            assert node() is not None
    assert not gc.isenabled(), "it is left as it was"
