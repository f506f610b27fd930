"""Output that is whole or absent: written beside its place, renamed when it is complete and on the disk."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megallm.checkpoint.stream import flush

_SECONDS_BETWEEN_LINES = 5.0
# In the names of folders that are being written, or that step aside.
_TOKEN = "[0-9a-f]" * 16


@contextmanager
def new_folder(final: Path, needed: int, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `final` at the end of the block, or vanishes where that fails.

    An interrupted program leaves at most a folder `final.TOKEN.tmp`, which nothing takes for finished, and what was at
    `final` before as `final.TOKEN.replaced`, which counts until the new one has its place: see `where_now`. The next
    conversion to the same place clears up.

    Raises ValueError if `final` is there and `overwrite` does not allow to replace it, if it cannot be written, or if
    less than `needed` bytes are free.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(final)
        check_absent(final, overwrite)
        check_space(final.parent, needed)
        temporary = final.with_name(f"{final.name}.{secrets.token_hex(8)}.tmp")
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"{final} cannot be written: {error.filename or final}: {error.strerror}") from None
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        _replace(temporary, final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(final.parent).free
        raise ValueError(
            f"{final} cannot be written: {error.strerror}; it takes {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB "
            "are free"
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary: Path, final: Path) -> None:
    """Renames; what was there before steps aside, and goes when the new one has its place."""
    before = temporary.with_name(temporary.name.removesuffix(".tmp") + ".replaced")
    if final.exists():
        os.rename(final, before)
    try:
        os.rename(temporary, final)
    except OSError:
        if before.exists():
            os.rename(before, final)
        raise
    flush(final.parent)
    if before.exists():
        shutil.rmtree(before)


def where_now(final: Path) -> Path:
    """`final`, or where it has stepped aside if whoever was replacing it was killed before the new one had its name."""
    if not final.exists():
        for before in _left(final, "replaced"):
            log_line(f"{final} was about to be replaced when that was interrupted; it is read from {before}")
            return before
    return final


def _clear_up(final: Path) -> None:
    """Puts back, or removes, what killed conversions to this place have left."""
    for before in _left(final, "replaced"):
        if final.exists():
            shutil.rmtree(before)
        else:
            os.rename(before, final)
    for left in _left(final, "tmp"):
        shutil.rmtree(left)


def _left(final: Path, kind: str) -> list[Path]:
    return sorted(final.parent.glob(f"{glob.escape(final.name)}.{_TOKEN}.{kind}"))


def check_absent(final: Path, overwrite: bool) -> None:
    """Raises ValueError if `final` is there and may not be replaced."""
    if final.exists() and not overwrite:
        raise ValueError(f"{final} is there already; give another folder, or --overwrite to replace it")


def check_space(folder: Path, needed: int) -> None:
    """Raises ValueError if fewer than `needed` bytes are free in a folder's file system."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"the output takes {needed / 1e9:.3f} GB, and {folder} has {free / 1e9:.3f} GB free")


class Progress:
    """Tells every few seconds how many bytes of the output are done, and how fast."""

    def __init__(self, total: int, log: Callable[[str], None]) -> None:
        self._total, self._log = total, log
        self._done = 0
        self._begin = self._last = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """So many bytes more are written."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            rate = self._done / (now - self._begin)
            left = (self._total - self._done) / rate
            self._log(f"{self._state(now)}, {left:.0f} s left")

    def finish(self) -> None:
        """Tells the whole."""
        self._done = self._total
        self._log(self._state(time.monotonic()))

    def _state(self, now: float) -> str:
        seconds = max(now - self._begin, 1e-6)
        return f"{self._done / 1e9:.3f} of {self._total / 1e9:.3f} GB, {self._done / seconds / 1e9:.2f} GB/s"


def log_line(text: str) -> None:
    """A line for whoever watches; standard output is left to results."""
    print(text, file=sys.stderr, flush=True)
