"""Arrays that are costly to build and needed again: kept in a folder under a key of their content.

An entry is one folder, `<key>/`, with one `.npy` file an array and `entry.json`, which names shapes, dtypes and
checksums. It appears by one rename, so it is whole or absent. Several processes may ask for the same entry at once, in
one job or in several: one builds it under a file lock, the others wait and read it. Where the file system knows no
locks each builds its own and the last one stays, which is as right.
"""

import contextlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # no file locks on this system
    fcntl = None  # type: ignore[assignment]

Arrays = dict[str, np.ndarray]


def load_or_build(folder: Path, key: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays stored under `key`, memory-mapped; built and stored when they are not there or not whole.

    Args:
        folder: where the entries lie; made when it does not exist.
        key: a name for the content: whatever changes the arrays must change it. Letters and digits.
        build: makes the arrays. Its errors pass through.

    Raises:
        ValueError: the folder cannot be written.
    """
    entry = folder / key
    stored = _load(entry)
    if stored is not None:
        return stored
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{key}.lock"):
            stored = _load(entry)
            if stored is not None:
                return stored
            arrays = build()
            _store(entry, arrays)
    except OSError as error:
        raise ValueError(
            f"The cache folder {folder} cannot be used: {error.strerror or error}. "
            "Name another one, or none to build in memory."
        ) from None
    return arrays


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _describe(array: np.ndarray) -> dict[str, object]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": _checksum(array)}


def _load(entry: Path) -> Arrays | None:
    """The arrays of an entry, or None when there is none, or when anything about it is not as it was written."""
    try:
        description = json.loads((entry / "entry.json").read_text())
        arrays: Arrays = {
            name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in description
        }
        return arrays if all(_describe(array) == description[name] for name, array in arrays.items()) else None
    except (OSError, ValueError, TypeError, AttributeError, EOFError):
        return None


def _store(entry: Path, arrays: Arrays) -> None:
    """Write an entry beside its place and rename it; what lies in its place is not valid and goes away."""
    token = secrets.token_hex(8)
    written, outdated = entry.with_name(f"{entry.name}.{token}.tmp"), entry.with_name(f"{entry.name}.{token}.old")
    written.mkdir()
    try:
        for name, array in arrays.items():
            np.save(written / f"{name}.npy", array, allow_pickle=False)
        (written / "entry.json").write_text(
            json.dumps({name: _describe(array) for name, array in arrays.items()}, indent=2)
        )
        with contextlib.suppress(FileNotFoundError):
            os.replace(entry, outdated)
        try:
            os.replace(written, entry)
        except OSError:
            # Without locks another process may have stored the same arrays in between.
            if _load(entry) is None:
                raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends; do nothing where the file system has none."""
    with open(path, "w") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
