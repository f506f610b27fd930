"""SIGTERM while a run starts up is told at once, also where the main thread is within a library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from megallm.train.before_steps import sigterm_is_told

# A second lock of the C library's mutex never returns, and no handler of Python's runs meanwhile.
_WITHIN_A_LIBRARY = """
import ctypes
from megallm.train.before_steps import sigterm_is_told
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with sigterm_is_told("program.py"):
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
"""


def test_sigterm_before_the_steps_is_told_and_ends_the_process() -> None:
    command = [sys.executable, "-c", _WITHIN_A_LIBRARY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 143
    assert errors == (
        "program.py: SIGTERM was received outside of the steps: left at once; what was saved before is whole\n"
    )


def test_another_handler_takes_over_and_everything_is_as_before_outside() -> None:
    heard: list[int] = []
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with sigterm_is_told("program.py"):
        ours = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, ours)
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
    assert threading.active_count() == threads
