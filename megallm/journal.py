"""What this process has sent and what it waits for, so that a hang or a dead process can be told by name.

Kept for every message of the engine, so it costs a few microseconds each and looks nothing up before it is asked.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

_CALLERS = 3
_PACKAGE = os.path.join(os.path.dirname(__file__), "")


class CommunicationError(RuntimeError):
    """A message did not come through: another process has ended, or did not take part in time."""


@dataclass(slots=True)
class Operation:
    """One message: what, on which group, the how manyth of that group, called from where (innermost first), when."""

    name: str
    group: str
    number: int
    callers: tuple[tuple[CodeType, int], ...]
    since: float

    def __str__(self) -> str:
        places = [f"{_short(code.co_filename)}:{line} in {code.co_name}" for code, line in self.callers]
        return f"{self.name}, number {self.number} of group {self.group}, called at {', from '.join(places)}"


class Journal:
    """The last operation of each group, and those that threads of this process are waiting in.

    Attributes: `activity`, the time (`time.monotonic()`) when an operation last began or came to its end; `stepping`,
        whether this process is in a step, where there are always messages.
    """

    def __init__(self) -> None:
        self.activity = time.monotonic()
        self.stepping = False
        self._last: dict[str, Operation] = {}
        self._waiting: dict[int, Operation] = {}

    def begin(self, name: str, group: str) -> Operation:
        """Takes note of an operation that is about to begin."""
        self.activity = time.monotonic()
        previous = self._last.get(group)
        number = 1 if previous is None else previous.number + 1
        operation = Operation(name, group, number, _callers(), self.activity)
        self._last[group] = operation
        return operation

    def wait(self, operation: Operation, wait: Any) -> Any:
        """Calls `wait`, which returns when the operation is over, and returns what it returns.

        Raises CommunicationError, which names the operation, where torch raises an error.
        """
        thread, self.activity = threading.get_ident(), time.monotonic()
        outer = self._waiting.get(thread)
        self._waiting[thread] = operation
        operation.since = self.activity
        try:
            return wait()
        except RuntimeError as error:
            if isinstance(error, CommunicationError):
                raise
            raise CommunicationError(f"{operation} failed: {str(error).strip().splitlines()[0]}") from error
        finally:
            self.activity = time.monotonic()
            if outer is None:
                del self._waiting[thread]
            else:
                self._waiting[thread] = outer

    @contextmanager
    def step(self) -> Iterator[None]:
        """Everything within is a step."""
        self.activity, self.stepping = time.monotonic(), True
        yield
        self.stepping = False

    def waiting(self) -> list[Operation]:
        """What threads of this process wait in."""
        return list(self._waiting.values())

    def last(self) -> list[Operation]:
        """The last operation of each group."""
        return list(self._last.values())


def stack_of_main_thread() -> list[str]:
    """Where the main thread is, innermost first: lines of this project, and the innermost whatever it is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    places: list[str] = []
    while frame is not None:
        path = frame.f_code.co_filename
        if not places or "site-packages" not in path:
            places.append(f"{_short(path)}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return places


def _callers() -> tuple[tuple[CodeType, int], ...]:
    """The innermost places outside the files that pass messages on."""
    frame: FrameType | None = sys._getframe(2)
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < _CALLERS:
        if not frame.f_code.co_filename.endswith(("/communication.py", "/journal.py")):
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def _short(path: str) -> str:
    """A path from the package's folder on, or its last two parts."""
    # The folder around the package may have its name, too.
    if path.startswith(_PACKAGE):
        return "megallm/" + path[len(_PACKAGE) :].replace("\\", "/")
    return "/".join(path.replace("\\", "/").split("/")[-2:])
