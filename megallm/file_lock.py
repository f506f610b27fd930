"""One process at a time, on any file system: a lock that is a file.

Locks of the operating system end with their process, but network file systems often do not know them, or keep them on
one machine. All that is asked for here is that creating a file fails when it is there. A lock file names its owner; one
that an ended process has left is taken over.

The lock saves work and guards nothing: where clocks or machines misbehave two owners are possible, and whatever is done
under it must then still come out right.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK = "in-use.lock"
"""The lock file of a folder that one job has for itself."""
# An owner writes its name within moments of creating the file.
SECONDS_WITHOUT_NAME = 5.0
# An owner on another machine is alive as long as it touches the file, which it does every HEARTBEAT seconds. The limit
# leaves room for clocks that differ and for file systems that show a change late.
HEARTBEAT = 10.0
SECONDS_WITHOUT_HEARTBEAT = 120.0


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock `path` inside the block if nobody else does; gives whether it is held. Its folder must exist.

    Raises:
        OSError: the file cannot be created.
    """
    token = _create(path)
    if token is None and _is_abandoned(path):
        _remove_abandoned(path)
        token = _create(path)
    if token is None:
        yield False
        return
    ended = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    heartbeat.start()
    try:
        yield True
    finally:
        ended.set()
        heartbeat.join()
        if _owner(path).get("token") == token:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def own_folder(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Have a folder for oneself inside the block.

    Waits where the owner is on another machine and may have ended, as long as it takes to know: a job that starts again
    elsewhere after a crash finds the lock of the one before.

    Raises:
        OSError: the lock file cannot be created.
        ValueError: another job has the folder; its host and process are named.
    """
    path = folder / LOCK
    first_beat: float | None = None
    while True:
        with try_lock(path) as is_held:
            if is_held:
                yield
                return
        owner = _owner(path)
        with contextlib.suppress(FileNotFoundError):
            beat = path.stat().st_mtime
            name = f"process {owner.get('process', '?')} on {owner.get('name', 'another machine')}"
            if owner.get("host") == _host() or (first_beat is not None and beat > first_beat):
                raise ValueError(
                    f"{folder} is in use by another job, {name}: end that one, or give this one another --save"
                )
            if first_beat is None:
                first_beat = beat
                log(f"{folder} was last used by {name}; waiting to see whether it lives")
        time.sleep(1.0)


def _create(path: Path) -> str | None:
    """Create a lock file in our name; None if there is one."""
    token = secrets.token_hex(8)
    owner = {
        "token": token,
        "host": _host(),
        "name": socket.gethostname(),
        "process": os.getpid(),
        "start": _start(os.getpid()),
    }
    text = json.dumps(owner).encode()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)
    return token


def _owner(path: Path) -> dict[str, object]:
    """What a lock file says; empty where it is gone or not yet written."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_abandoned(path: Path) -> bool:
    """Whether the owner of a lock file has ended."""
    owner = _owner(path)
    try:
        silence = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if not owner:
        return silence > SECONDS_WITHOUT_NAME
    if owner.get("host") == _host() and isinstance(owner.get("process"), int):
        start = _start(owner["process"])  # type: ignore[arg-type]
        return start is None or start != owner.get("start")
    return silence > SECONDS_WITHOUT_HEARTBEAT


def _remove_abandoned(path: Path) -> None:
    """Remove a lock file whose owner has ended, and never the one that has come in its place.

    Many processes find an abandoned lock at the same moment. The one that creates a file named after the lock's owner
    may remove it; by the time another one can, the lock has a new owner, and it sees that.
    """
    token = _owner(path).get("token")
    permit = path.with_name(f"{path.name}.{token}.takeover")
    try:
        os.close(os.open(permit, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        # Held for moments only, unless its process was killed in them.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - permit.stat().st_mtime > SECONDS_WITHOUT_NAME:
                permit.unlink(missing_ok=True)
        return
    try:
        if _owner(path).get("token") == token and _is_abandoned(path):
            path.unlink(missing_ok=True)
    finally:
        permit.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _host() -> str:
    """This machine since it was started, and the space in which its process numbers are unique."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        # Not Linux: an owner is then known by its heartbeat alone.
        return secrets.token_hex(8)


def _start(process: int) -> str | None:
    """When a process was started, which tells it from a later one of its number; None if it has ended."""
    try:
        # The program's name, in parentheses, may hold anything; the state and 18 numbers come before the start.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
