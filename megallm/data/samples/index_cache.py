"""Arrays that are costly to build and needed again: kept in a folder under a key of their content.

An entry is one folder, `<key>/`, with one `.npy` file an array and `entry.json`, which names shapes, dtypes and
checksums. It is written and flushed to the disk in `.building/` and appears by one rename, so it is whole or absent.

Any number of processes, of one job or several, on one machine or many that share the folder, may ask for an entry at
the same time: one builds it, the others sleep and look now and then (see `file_lock`, which needs no locks of the file
system). What a killed process has left is removed by the next one that builds, or that asks for the same entry.

An entry that is found is checked. Each process compares names, dtypes, shapes, headers and sizes with `entry.json`.
One process of each machine also computes the checksums of all bytes, the first time the entry is used there and
whenever one of its files has changed since (see `node_memory`): a cache of 10 GB takes it two seconds and the reading.
An entry that fails is built again.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from megallm.data.samples.node_memory import file_signature, once_per_node, status_signature
from megallm.file_lock import try_lock

Arrays = dict[str, np.ndarray]

# Goes up when the form of an entry changes.
FORM = 2
# Errors of opening that say nothing about the file.
OF_THIS_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# How often a process that waits for another one's entry looks for it, at first and in the long run.
SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 1.0


def load_or_build(folder: Path, key: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays stored under `key`, memory-mapped; built and stored when they are not there or not whole.

    Args:
        folder: where the entries lie; made when it does not exist. Entries that exist are also read from a folder that
            cannot be written.
        key: a name for the content: whatever changes the arrays must change it. Letters and digits.
        build: makes the arrays. Its errors pass through.

    Raises:
        ValueError: the entry is missing or damaged, and the folder cannot be written or is full.
    """
    assert key.isalnum(), f"the key {key!r} is more than letters and digits"
    entry, working = folder / key, folder / ".building"
    lock = working / f"{key}.lock"
    refused = ""
    pause = SHORTEST_PAUSE
    while True:
        state = _state(entry)
        # What was refused once is looked at again when it has changed.
        stored = _load(entry) if state != refused else None
        if stored is not None:
            _remove_leftovers_of(lock)
            return stored
        refused = state
        with contextlib.ExitStack() as stack:
            try:
                working.mkdir(parents=True, exist_ok=True)
                is_held = stack.enter_context(try_lock(lock))
            except OSError as error:
                raise _cannot_be_written(folder, error) from None
            if is_held:
                return _build_entry(entry, working, build)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def content_hash(path: Path, status: os.stat_result, name: str, array: np.ndarray) -> str:
    """Digest of an array's bytes, for a key; `array` is what the file `path` holds under a name.

    The file's status is that at its opening for this array: by now another file may have taken its place.

    One process of a machine reads the array, at 1 GB/s or more; the others are given the digest as long as the file's
    place, size, inode and times stay.
    """
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def digest() -> str:
        return hashlib.blake2b(flat.data, digest_size=20).hexdigest()

    return once_per_node(f"{name} of {path.absolute()}: {array.dtype.str}", status_signature(path, status), digest)


def _build_entry(entry: Path, working: Path, build: Callable[[], Arrays]) -> Arrays:
    """Build and store an entry under its lock, and read it back."""
    _remove_leftovers(working, entry.name)
    # It may have appeared between the last look and the lock.
    stored = _load(entry)
    if stored is not None:
        return stored
    arrays = build()
    try:
        _store(entry, working, arrays)
    except OSError as error:
        raise _cannot_be_written(entry.parent, error) from None
    stored = _load(entry)
    if stored is None:
        raise ValueError(
            f"The cache entry {entry} does not read back as it was written: the disk or the memory of this machine is "
            "not sound. Name a folder on another disk with --data-cache-path."
        )
    return stored


def _cannot_be_written(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"The indices are not in the cache folder {folder}, and cannot be written there: {error.strerror or error}. "
        "Name another folder with --data-cache-path."
    )


def _state(entry: Path) -> str:
    """Changes when another entry takes the place of this one."""
    with contextlib.suppress(OSError):
        return file_signature(entry / "entry.json")
    return "absent"


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _describe(key: str, arrays: Arrays, headers: dict[str, bytes]) -> dict[str, object]:
    """What `entry.json` says, with a checksum of its own. `headers` are the bytes that precede an array in its file."""
    described = {
        name: {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "offset": len(headers[name]),
            "header_crc32": zlib.crc32(headers[name]),
            "crc32": _checksum(array),
        }
        for name, array in arrays.items()
    }
    return {"form": FORM, "key": key, "arrays": described, "crc32": _checksum_of_description(key, described)}


def _checksum_of_description(key: str, described: object) -> int:
    return zlib.crc32(json.dumps([FORM, key, described], sort_keys=True).encode())


def _load(entry: Path) -> Arrays | None:
    """The arrays of an entry, or None when there is none, or when anything about it is not as it was written.

    Raises:
        ValueError: there is one, but it cannot be opened: too many files are open, or memory maps in use.
    """
    try:
        description = json.loads((entry / "entry.json").read_text())
        described = description["arrays"]
        if description["crc32"] != _checksum_of_description(entry.name, described):
            return None
        # Renaming the folder leaves the files' states as they are: the builder's check stands.
        signature = f"{description['crc32']} {file_signature(*(entry / f'{name}.npy' for name in described))}"
        arrays = {name: _map(entry / f"{name}.npy", expected) for name, expected in described.items()}
    except OSError as error:
        if error.errno in OF_THIS_PROCESS:
            raise ValueError(f"The indices in {entry} cannot be opened by this process: {error.strerror}.") from None
        return None
    except (ValueError, TypeError, KeyError):
        return None

    def check() -> str:
        is_whole = all(_checksum(array) == described[name]["crc32"] for name, array in arrays.items())
        return "whole" if is_whole else "damaged"

    return arrays if once_per_node(f"entry {entry.absolute()}", signature, check) == "whole" else None


def _map(path: Path, expected: dict) -> np.ndarray:
    """The array of a file, whose size and header are as described.

    Raises:
        ValueError: they are not.
    """
    dtype, shape, offset = np.dtype(expected["dtype"]), tuple(expected["shape"]), expected["offset"]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != offset + dtype.itemsize * math.prod(shape):
            raise ValueError(f"{path} has {size} bytes")
        if zlib.crc32(file.read(offset)) != expected["header_crc32"]:
            raise ValueError(f"{path} begins with another header")
        return np.memmap(file, dtype, "r", offset, shape)


def _store(entry: Path, working: Path, arrays: Arrays) -> None:
    """Write an entry beside its place and rename it; what lies in its place is not valid and goes away.

    Raises:
        OSError: it cannot be written; nothing is left then.
    """
    needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(working).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB are free")
    token = secrets.token_hex(8)
    written, outdated = working / f"{entry.name}.{token}.tmp", working / f"{entry.name}.{token}.old"
    try:
        written.mkdir()
        headers = {name: _write(written / f"{name}.npy", array) for name, array in arrays.items()}
        with open(written / "entry.json", "w") as file:
            json.dump(_describe(entry.name, arrays, headers), file, indent=2)
            _flush(file)
        with contextlib.suppress(FileNotFoundError):
            os.replace(entry, outdated)
        try:
            os.replace(written, entry)
        except OSError:
            # Another process may have taken the lock for abandoned and stored the same arrays, or be doing so.
            if _load(entry) is None:
                raise
    finally:
        _remove(written)
        _remove(outdated)


def _write(path: Path, array: np.ndarray) -> bytes:
    """Write an array to a `.npy` file; gives its header."""
    with open(path, "w+b") as file:
        np.save(file, np.asarray(array, order="C"), allow_pickle=False)
        _flush(file)
        length = file.tell() - array.nbytes
        file.seek(0)
        return file.read(length)


def _flush(file: IO) -> None:
    """To the disk, where the file system can: after a crash of the machine a renamed file must not be empty."""
    file.flush()
    with contextlib.suppress(OSError):
        os.fsync(file.fileno())


def _remove_leftovers_of(lock: Path) -> None:
    """Clean up after a process that was killed between storing an entry and releasing its lock."""
    with contextlib.suppress(OSError):
        if lock.exists():
            with try_lock(lock) as is_held:
                if is_held:
                    _remove_leftovers(lock.parent, lock.stem)


def _remove_leftovers(working: Path, held_key: str) -> None:
    """Remove what killed processes left of `held_key`, whose lock is ours, and of every key whose lock is free."""
    with contextlib.suppress(OSError):
        left = [path for path in working.iterdir() if path.name != f"{held_key}.lock"]
        for key in {path.name.split(".")[0] for path in left}:
            with contextlib.ExitStack() as stack:
                if key == held_key or stack.enter_context(try_lock(working / f"{key}.lock")):
                    for path in left:
                        if path.name.startswith(f"{key}.") and path.name != f"{key}.lock":
                            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
