"""One job to a folder: the second one is told who has it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from megallm import file_lock
from megallm.file_lock import LOCK, own_folder


def nothing(message: str) -> None:
    pass


def test_the_second_job_is_told_of_the_first(tmp_path: Path) -> None:
    with own_folder(tmp_path, nothing):
        name = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=name), own_folder(tmp_path, nothing):
            pass
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
    with own_folder(tmp_path, nothing):
        pass


def test_a_lock_of_a_process_that_ended_is_taken_over(tmp_path: Path) -> None:
    ended = {"token": "0", "host": file_lock._host(), "name": "here", "process": 2**22 + 1, "start": "1"}
    (tmp_path / LOCK).write_text(json.dumps(ended))
    with own_folder(tmp_path, nothing):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A lock that a process on another machine has made."""
    owner = {"token": "0", "host": "another", "name": "node7", "process": 4711, "start": "1"}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    return tmp_path / LOCK


def test_the_owner_on_another_machine_is_seen_to_live(elsewhere: Path) -> None:
    said: list[str] = []
    beat = threading.Timer(0.3, os.utime, (elsewhere,))
    beat.start()
    in_use = pytest.raises(ValueError, match="in use by another job, process 4711 on node7")
    with in_use, own_folder(elsewhere.parent, said.append):
        pass
    assert len(said) == 1 and "last used by process 4711 on node7; waiting" in said[0]


def test_without_a_sign_of_life_its_lock_is_taken_over(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "SECONDS_WITHOUT_HEARTBEAT", 0.5)
    begin = time.monotonic()
    with own_folder(elsewhere.parent, nothing):
        assert time.monotonic() - begin > 0.5
