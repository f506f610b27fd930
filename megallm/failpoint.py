"""Places at which a test makes a save fail: `python -m megallm.failpoint` lists them.

The environment variable MEGALLM_FAILPOINT arms one: `NAME=kill` ends the process there by SIGKILL, `NAME=EIO` raises
that error of the operating system. `NAME@RANK` means that rank of the job only, `NAME#N` the N-th time (from 1) that
the place is reached: `checkpoint.shard.write.after@1#3=kill`. Without the variable a place costs one look-up.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

VARIABLE = "MEGALLM_FAILPOINT"

POINTS = {
    "checkpoint.folder.create": "the temporary folder",
    "checkpoint.shard.open": "a rank's file of tensors",
    "checkpoint.shard.write": "a piece of that file",
    "checkpoint.shard.fsync": "that file, to the disk",
    "checkpoint.rows.write": "what a rank's file holds, for the manifest",
    "checkpoint.rows.remove": "the lists, once they are in the manifest",
    "checkpoint.manifest.write": "the manifest",
    "checkpoint.manifest.fsync": "the manifest, to the disk",
    "checkpoint.folder.fsync": "the names in the temporary folder, to the disk",
    "checkpoint.folder.replace": "a checkpoint of the same iteration steps aside",
    "checkpoint.folder.rename": "the temporary folder gets its final name: the commit",
    "checkpoint.parent.fsync": "that name, to the disk",
    "checkpoint.tracker.write": "the file that names the latest iteration, under another name",
    "checkpoint.tracker.rename": "that file gets its name",
    "checkpoint.replaced.remove": "the checkpoint that stepped aside goes",
    "checkpoint.prune.rename": "an old checkpoint that is surplus loses its name",
    "checkpoint.prune.remove": "its files go",
    "checkpoint.leftovers.remove": "what killed saves have left goes",
}
"""What is about to be done (`NAME.before`) or has been done (`NAME.after`)."""

_SPECIFICATION = re.compile(r"(?P<name>[a-z.]+)(@(?P<rank>\d+))?(#(?P<nth>\d+))?=(?P<deed>\w+)")


class _Armed:
    """The failpoint of this process, and how often its place is still passed unharmed."""

    def __init__(self, specification: str) -> None:
        found = _SPECIFICATION.fullmatch(specification)
        point = found["name"].rpartition(".") if found else ("", "", "")
        if found is None or point[0] not in POINTS or point[2] not in ("before", "after"):
            raise ValueError(
                f"{VARIABLE}={specification} names no failpoint; it is NAME.before=kill or NAME.after=EIO, with a NAME "
                "that `python -m megallm.failpoint` lists"
            )
        self.name, self._deed = found["name"], found["deed"]
        is_meant = found["rank"] in (None, os.environ.get("RANK", "0"))
        self._left = int(found["nth"] or 1) if is_meant else 0

    def reach(self) -> None:
        self._left -= 1
        if self._left != 0:
            return
        if self._deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self._deed)
        raise OSError(code, os.strerror(code))


@lru_cache(maxsize=1)
def _armed(specification: str) -> _Armed:
    return _Armed(specification)


@contextmanager
def passing(name: str) -> Iterator[None]:
    """Around the doing of `name`, one of POINTS: reaches its two failpoints."""
    assert name in POINTS, f"{name} is not in the list of failpoints"
    _reach(f"{name}.before")
    yield
    _reach(f"{name}.after")


def _reach(name: str) -> None:
    specification = os.environ.get(VARIABLE)
    if specification:
        armed = _armed(specification)
        if armed.name == name:
            armed.reach()


if __name__ == "__main__":
    for name, meaning in POINTS.items():
        print(f"{name}.before, {name}.after: {meaning}")
