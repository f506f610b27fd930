"""SIGTERM where there is no step that could be finished: the process says so and leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_END = 0  # no signal has this number


@contextmanager
def sigterm_is_told(name: str) -> Iterator[None]:
    """Within this, SIGTERM has the program called `name` say that it leaves, and end with code 143, the shell's for it.

    Once something else handles the signal, as the training does from its first step on, this no longer does. A thread
    waits for the signal: the main thread may be within a call of torch, which would keep a handler of Python's from
    running for as long as it takes.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def handle(*_: object) -> None:
        """Nothing: that it is there has the signal's number written to the pipe."""

    def wait() -> None:
        while (number := os.read(heard, 1)[0]) != _END:
            if number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handle:
                if os.environ.get("RANK", "0") == "0":
                    sentence = "SIGTERM was received outside of the steps: left at once; what was saved before is whole"
                    print(f"{name}: {sentence}", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handle)
    descriptor_before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    waiting = threading.Thread(target=wait, name="sigterm", daemon=True)
    waiting.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(descriptor_before)
        # Processes that were forked may have the pipe open: closing it would not end the thread.
        os.write(told, bytes([_END]))
        waiting.join()
        os.close(told)
        os.close(heard)
