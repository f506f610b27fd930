"""What asks a run to save or to leave before its end: signals, a time limit, an interval, a file."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from megallm.config.tree import Config
from megallm.mesh import Hosts

SAVE_NOW = "save-now"
"""A file of this name in the --save folder asks for a checkpoint."""
# How much longer than the longest so far the next step, save or evaluation may take.
_ALLOWANCE = 1.5
# Before the first save nobody knows how long one takes.
_SECONDS_OF_FIRST_SAVE = 60.0
_SHARE_OF_FIRST_SAVE = 0.1
_STEPS_REMEMBERED = 20


class ExitCode(IntEnum):
    """With which code an entry script ends."""

    FINISHED = 0
    """Trained to the end, or to a step that --exit-interval divides."""
    DEFECT = 1
    """An error in the program: it ends with a traceback."""
    MISTAKE = 2
    """The configuration, or a file that it names, is wrong: one sentence says what."""
    LOST = 69
    """Another process of the job has ended or hangs (EX_UNAVAILABLE of sysexits.h): each rank says what it knows."""
    NOT_SAVED = 74
    """The last checkpoint could not be written (EX_IOERR of sysexits.h)."""
    UNFINISHED = 75
    """Left early, with a checkpoint: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
    UNSAVED = 76
    """Left early without a checkpoint, since --save names no folder: the same command begins again."""
    INTERRUPTED = 130
    """Ctrl-C: left at once, without a checkpoint."""


class Wish(NamedTuple):
    """What is to be done after a step: save at once, or leave for some `reason` (None where the run goes on)."""

    save: bool
    reason: str | None
    exit_code: ExitCode = ExitCode.FINISHED

    @property
    def leaves(self) -> bool:
        """Whether the run is to end here."""
        return self.reason is not None


NOTHING = Wish(False, None)
Ask = Callable[[], Wish]
"""Called by all ranks together, between the parts of what takes its time: whether something asks for its end."""


class Stopping:
    """Watches for everything that asks a run to save or to leave; all ranks get the same answer after each step.

    To be used in a `with` block, within which SIGTERM and SIGUSR1 are caught. A signal to one process is enough.
    `started` is the time, of `time.monotonic()`, from which --exit-duration-in-mins counts.
    """

    def __init__(self, config: Config, hosts: Hosts, started: float) -> None:
        self._hosts = hosts
        self._interval = config.training.exit_interval
        minutes = config.training.exit_duration_in_mins
        self._minutes = minutes
        self._deadline = None if minutes is None else started + 60.0 * minutes
        self._first_save = 0.0 if minutes is None else min(_SECONDS_OF_FIRST_SAVE, _SHARE_OF_FIRST_SAVE * 60 * minutes)
        self._save_now = Path(config.checkpoint.save) / SAVE_NOW if config.checkpoint.save else None
        self._unfinished = ExitCode.UNFINISHED if config.checkpoint.save else ExitCode.UNSAVED
        self._steps: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._last = time.monotonic()
        self._received: set[int] = set()
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Stopping:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, lambda received, _: self._received.add(received))
        self._last = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def after_step(self, iteration: int, save_seconds: float, pause_seconds: float = 0.0) -> Wish:
        """Called by all ranks after each step.

        Args:
            iteration: steps that were done.
            save_seconds: the longest that a save has taken, 0 if none has.
            pause_seconds: what the evaluation and the save that come before the next step may take.
        """
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last = now
        wish = self._agree(now, max(self._steps) + self._of_save(save_seconds) + pause_seconds)
        if wish.reason is None and self._interval is not None and iteration % self._interval == 0:
            return Wish(False, f"--exit-interval {self._interval} divides it")
        return wish

    def within_pause(self, save_seconds: float, *, is_saved: bool) -> Wish:
        """The same between two steps: after each batch of an evaluation, and of what else takes its time.

        Where the step `is_saved`, only what asks the run to leave is heard. The rest is heard after the next step.
        """
        # A batch takes no longer than a step.
        seconds = max(self._steps, default=0.0) + self._of_save(save_seconds)
        return self._agree(time.monotonic(), seconds, only_to_leave=is_saved)

    def pause(self) -> None:
        """What was done since the last step (a save, an evaluation) does not count as a part of the next."""
        self._last = time.monotonic()

    def _agree(self, now: float, seconds: float, *, only_to_leave: bool = False) -> Wish:
        """What any of the ranks was asked for. `seconds`: what comes next, with the save after it, may take so long."""
        heard = {signal.SIGTERM} if only_to_leave else {signal.SIGTERM, signal.SIGUSR1}
        signals = self._received & heard
        self._received -= signals
        wishes = [
            signal.SIGTERM in signals,
            self._is_time_over(now, seconds),
            signal.SIGUSR1 in signals,
            not only_to_leave and self._is_file_there(),
        ]
        agreed = torch.tensor([float(wish) for wish in wishes])
        self._hosts.world.all_reduce(agreed, "max")
        terminated, over, user_signal, file = (bool(wish) for wish in agreed.tolist())
        if file and self._hosts.world.rank == 0 and self._save_now is not None:
            try:
                self._save_now.unlink(missing_ok=True)
            except OSError:
                self._save_now = None  # it would ask after every step
        if terminated:
            return Wish(True, "SIGTERM was received", self._unfinished)
        if over:
            reason = f"--exit-duration-in-mins {self._minutes:g} leaves no time to go on"
            return Wish(True, reason, ExitCode.FINISHED if _restarts() else self._unfinished)
        return Wish(user_signal or file, None)

    def _of_save(self, seconds: float) -> float:
        return seconds or self._first_save

    def _is_time_over(self, now: float, seconds: float) -> bool:
        """Whether what takes so many seconds might not fit before the deadline. The first rank's clock decides."""
        if self._deadline is None or self._hosts.world.rank != 0:
            return False
        return now + _ALLOWANCE * seconds > self._deadline

    def _is_file_there(self) -> bool:
        # Unlike the method of a path, this finds nothing where the file system is gone.
        return self._hosts.world.rank == 0 and self._save_now is not None and os.path.exists(self._save_now)


def _restarts() -> bool:
    """Whether a launcher restarts failed jobs: it would take a code for a failure, and train past the time."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return restarts.isdigit() and int(restarts) > 0
