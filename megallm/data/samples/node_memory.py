"""What the processes of one machine need to find out only once: kept in a folder of the machine's own.

The digest of gigabytes, for example, which every process of a node needs when it starts.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megallm.file_lock import try_lock


def once_per_node(name: str, signature: str, compute: Callable[[], str]) -> str:
    """`compute()`, or what another process of this machine got for the same name and signature.

    The others wait while one computes. Where the machine's folder for temporary files cannot be used, each computes.

    Args:
        name: what is computed.
        signature: the state of what it is computed from. Another signature under the same name replaces the former one.
        compute: its errors pass through.
    """
    folder = _folder()
    if folder is None:
        return compute()
    path = folder / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    pause = 0.01
    while True:
        known = _read(path, signature)
        if known is not None:
            return known
        with contextlib.ExitStack() as stack:
            try:
                is_held = stack.enter_context(try_lock(path.with_name(f"{path.name}.lock")))
            except OSError:
                return compute()
            if is_held:
                known = _read(path, signature)
                if known is None:
                    known = compute()
                    _write(path, signature, known)
                return known
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def file_signature(*paths: Path) -> str:
    """Changes whenever one of the files is written, replaced or renamed, even if its size and times are set back.

    Raises:
        OSError: one of them is not there.
    """
    return json.dumps([status_signature(path, path.stat()) for path in paths])


def status_signature(path: Path, status: os.stat_result) -> str:
    """The same for one file, whose status was taken when it was opened."""
    state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return json.dumps([str(path.absolute()), *state])


def _folder() -> Path | None:
    """This user's folder; None where there is none that nobody else can write."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"megallm-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(state.st_mode) and state.st_uid == user and not state.st_mode & 0o022
    return folder if is_ours else None


def _read(path: Path, signature: str) -> str | None:
    try:
        kept = json.loads(path.read_text())
        return str(kept["value"]) if kept["signature"] == signature else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, signature: str, value: str) -> None:
    """Keep a value; without it the next one computes again."""
    beside = path.with_name(f"{path.name}.tmp")
    with contextlib.suppress(OSError):
        beside.write_text(json.dumps({"signature": signature, "value": value}))
        os.replace(beside, path)
