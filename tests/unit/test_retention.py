"""What is kept once a newer checkpoint is on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallm.checkpoint.manifest import MANIFEST
from megallm.checkpoint.retention import Retention, prune


def left(retention: Retention, saved: list[int]) -> list[int]:
    """What is there after saves at these iterations, in this order."""
    there: list[int] = []
    for iteration in saved:
        there.append(iteration)
        there = [other for other in there if other not in retention.surplus(there, iteration)]
    return there


@pytest.mark.parametrize(
    ("retention", "saved", "expected"),
    [
        (Retention(), [10, 20, 30, 40], [10, 20, 30, 40]),
        (Retention(keep_last=2), [10, 20, 30, 40], [30, 40]),
        (Retention(keep_last=3), [10, 20, 30, 40], [20, 30, 40]),
        (Retention(retain_interval=20), [10, 20, 30, 40, 50, 60], [20, 40, 50, 60]),
        (Retention(retain_interval=30, keep_last=3), [10, 20, 30, 40, 50, 60, 70], [30, 50, 60, 70]),
        # 5 and 15 go when two newer ones are there; those of the interval stay.
        (Retention(save_interval=10, non_persistent_interval=5), [5, 10, 15, 20, 25], [10, 20, 25]),
        (
            Retention(save_interval=10, non_persistent_interval=5, keep_last=2),
            [5, 10, 15, 20, 25, 30, 35],
            [20, 30, 35],
        ),
        (Retention(non_persistent_interval=5), [5, 10, 15], [10, 15]),
    ],
)
def test_what_is_left(retention: Retention, saved: list[int], expected: list[int]) -> None:
    assert left(retention, saved) == expected


def test_checkpoints_of_a_run_that_went_back_are_left_alone() -> None:
    # 400 and 500 are from before somebody went back to 200: they are no reason to remove 100 and 200.
    assert Retention(keep_last=2).surplus([100, 200, 210, 400, 500], 210) == [100]


optional = st.none() | st.integers(1, 12)


@given(st.none() | st.integers(2, 5), optional, optional, optional, st.sets(st.integers(1, 200)))
def test_the_last_two_and_those_to_retain_always_stay(
    keep_last: int | None, retain: int | None, interval: int | None, transient: int | None, saved: set[int]
) -> None:
    if saved:
        gone = Retention(keep_last, retain, interval, transient).surplus(saved, max(saved))
        assert not set(gone) & set(sorted(saved)[-2:])
        assert not [iteration for iteration in gone if retain and iteration % retain == 0]
        assert set(gone) <= saved


def test_only_whole_checkpoints_count_and_go(tmp_path: Path) -> None:
    for name in ("iter_0000010", "iter_0000020", "iter_0000030", "iter_0000040"):
        (tmp_path / name).mkdir()
    for name in ("iter_0000010", "iter_0000020", "iter_0000040"):
        (tmp_path / name / MANIFEST).touch()
    (tmp_path / "iter_0000005_copy").mkdir()
    prune(str(tmp_path), Retention(keep_last=2), 40, "0" * 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000005_copy",
        "iter_0000020",
        "iter_0000030",
        "iter_0000040",
    ]
