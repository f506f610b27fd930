"""What asks a run to save or to leave is heard after the step, once, and by all."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megallm.config.tree import CheckpointConfig, Config, TrainingConfig
from megallm.mesh import Hosts
from megallm.train.stopping import NOTHING, SAVE_NOW, ExitCode, Stopping, Wish


def stopping(save: Path | None = None, started: float | None = None, **training: float) -> Stopping:
    checkpoint = CheckpointConfig(save=None if save is None else str(save))
    config = Config(training=TrainingConfig(**training), checkpoint=checkpoint)  # type: ignore[arg-type]
    return Stopping(config, Hosts.alone(), time.monotonic() if started is None else started)


def test_without_a_wish_the_run_goes_on() -> None:
    with stopping() as watched:
        assert watched.after_step(1, 0.0) == NOTHING


@pytest.mark.parametrize("saves", [True, False])
def test_sigterm_saves_and_leaves(tmp_path: Path, saves: bool) -> None:
    code = ExitCode.UNFINISHED if saves else ExitCode.UNSAVED
    with stopping(save=tmp_path if saves else None) as watched:
        for ask in (
            lambda: watched.after_step(1, 0.0),
            lambda: watched.within_pause(0.0, is_saved=False),
            lambda: watched.within_pause(0.0, is_saved=True),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
            assert ask() == Wish(True, "SIGTERM was received", code)
            assert ask() == NOTHING


def test_sigusr1_saves_once_and_goes_on() -> None:
    with stopping() as watched:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watched.after_step(1, 0.0) == Wish(True, None)
        assert watched.after_step(2, 0.0) == NOTHING


def test_a_request_to_save_waits_for_the_next_step_where_this_one_is_saved(tmp_path: Path) -> None:
    with stopping(save=tmp_path) as watched:
        for ask in (lambda: os.kill(os.getpid(), signal.SIGUSR1), (tmp_path / SAVE_NOW).touch):
            ask()
            assert watched.within_pause(0.0, is_saved=True) == NOTHING
            assert watched.within_pause(0.0, is_saved=False) == Wish(True, None)
            assert watched.after_step(1, 0.0) == NOTHING


def test_signals_are_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGTERM)
        assert not heard
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_file_asks_once(tmp_path: Path) -> None:
    with stopping(save=tmp_path) as watched:
        (tmp_path / SAVE_NOW).touch()
        assert watched.after_step(1, 0.0) == Wish(True, None)
        assert not (tmp_path / SAVE_NOW).exists()
        assert watched.after_step(2, 0.0) == NOTHING


def test_a_file_that_cannot_be_removed_asks_once_and_then_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", fail)
    with stopping(save=tmp_path) as watched:
        (tmp_path / SAVE_NOW).touch()
        assert watched.after_step(1, 0.0) == Wish(True, None)
        assert watched.after_step(2, 0.0) == NOTHING


def test_a_folder_that_cannot_be_looked_into_asks_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # The error is another one than that nothing is there; a mount that is gone gives others yet.
    with stopping(save=tmp_path / "file") as watched:
        assert watched.after_step(1, 0.0) == NOTHING
    with stopping(save=tmp_path / ("name" * 100)) as watched:
        assert watched.after_step(1, 0.0) == NOTHING


def test_the_interval_leaves_at_its_multiples() -> None:
    with stopping(exit_interval=3) as watched:
        wishes = [watched.after_step(step, 0.0) for step in (1, 2, 3)]
    assert wishes == [NOTHING, NOTHING, Wish(False, "--exit-interval 3 divides it", ExitCode.FINISHED)]


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


def leaves_at(clock: Clock, minutes: float, step_seconds: Callable[[int], float], save_seconds: float) -> float:
    """Seconds after the start at which a run of such steps is told to leave."""
    with stopping(started=clock.now, exit_duration_in_mins=minutes) as watched:
        begin = clock.now
        for step in range(1, 10_000):
            clock.now += step_seconds(step)
            if watched.after_step(step, save_seconds).reason:
                return clock.now - begin
    raise AssertionError("it never leaves")


def test_time_for_another_step_and_a_save_is_left(clock: Clock) -> None:
    # 1.5 x (10 + 40) = 75 seconds before the end of 600: after the 53rd step, at 530.
    assert leaves_at(clock, 10, lambda step: 10.0, save_seconds=40.0) == 530.0


def test_the_longest_of_the_last_steps_counts(clock: Clock) -> None:
    # One step of 60 seconds among those of 10: 1.5 x (60 + 40) = 150 before the end.
    assert leaves_at(clock, 10, lambda step: 60.0 if step == 40 else 10.0, save_seconds=40.0) == 460.0


def test_before_the_first_save_a_tenth_of_the_time_is_left_for_it(clock: Clock) -> None:
    # min(60, 60) = 60: 1.5 x (10 + 60) = 105 seconds before the end of 600.
    assert leaves_at(clock, 10, lambda step: 10.0, save_seconds=0.0) == 500.0


def test_an_evaluation_before_the_next_step_needs_its_time_too(clock: Clock) -> None:
    with stopping(started=clock.now, exit_duration_in_mins=10.0) as watched:
        clock.now += 200
        # 1.5 x (200 + 40) = 360 seconds of the 400 that are left; with an evaluation of 30 seconds it is 405.
        assert not watched.after_step(1, 40.0).leaves
        watched.pause()
        assert watched.after_step(2, 40.0, pause_seconds=30.0).leaves


def test_an_evaluation_that_takes_too_long_is_not_waited_for(clock: Clock) -> None:
    with stopping(started=clock.now, exit_duration_in_mins=10.0) as watched:
        clock.now += 10
        assert not watched.after_step(1, 40.0).leaves
        # 1.5 x (10 + 40) = 75 seconds before the end of 600.
        clock.now += 510
        assert not watched.within_pause(40.0, is_saved=True).leaves
        clock.now += 10
        assert watched.within_pause(40.0, is_saved=True).leaves


def test_an_evaluation_is_no_step(clock: Clock) -> None:
    with stopping(started=clock.now, exit_duration_in_mins=10.0) as watched:
        clock.now += 10
        watched.after_step(1, 1.0)
        clock.now += 300
        watched.pause()
        clock.now += 10
        assert watched.after_step(2, 1.0).reason is None, "320 of 600 seconds are over"


def test_a_launcher_that_restarts_is_not_told_of_a_failure(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for restarts, code in (("0", ExitCode.UNSAVED), ("3", ExitCode.FINISHED)):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        with stopping(started=clock.now - 600, exit_duration_in_mins=10.0) as watched:
            wish = watched.after_step(1, 0.0)
        assert (wish.save, wish.exit_code) == (True, code)
        assert wish.reason == "--exit-duration-in-mins 10 leaves no time to go on"
