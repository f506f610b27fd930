"""Files read at positions: opened once, measured at opening, and a file that shrinks later is an error message."""

import mmap
import os
import stat
import sys
import weakref
from pathlib import Path

import numpy as np

# Bytes that one system call reads or copies: large enough for the speed of a disk, small in memory.
BLOCK_BYTES = 8 << 20


class InputFile:
    """A file opened read-only, and kept open until `close` or until nobody holds this object.

    Attributes: `path`; `descriptor` of the operating system; `status` and `size` in bytes at opening.

    Raises:
        ValueError: there is no such file, it is a folder, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
        self._close = weakref.finalize(self, os.close, self.descriptor)
        self.status = status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
            raise ValueError(f"{path} is {kind}, but must be a file.")
        self.size = status.st_size

    def __enter__(self) -> "InputFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; arrays made by `map` stay valid."""
        self._close()

    def check_size(self) -> None:
        """Raise ValueError when the file is shorter than at opening: touching lost bytes of a map ends the process."""
        size = os.fstat(self.descriptor).st_size
        if size < self.size:
            raise self._shrunk(size)

    def read(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        """An array [count] of `dtype` from byte `offset` on, by plain positional reads.

        Raises:
            ValueError: the file ends earlier, or cannot be read.
        """
        array = np.empty(count, dtype)
        left = array.data.cast("B") if count else memoryview(b"")
        while left:
            try:
                got = os.preadv(self.descriptor, [left[: 1 << 30]], offset)
            except OSError as error:
                raise ValueError(f"{self.path} cannot be read at byte {offset}: {error.strerror}.") from None
            if got == 0:
                raise self._shrunk(os.fstat(self.descriptor).st_size)
            offset, left = offset + got, left[got:]
        return array

    def map(self) -> mmap.mmap | bytes:
        """The content of the file, memory-mapped and read-only; an empty file is no map, since the system refuses it.

        Raises:
            ValueError: the system refuses the map.
        """
        if self.size == 0:
            return b""
        try:
            return _map(self.descriptor, self.size)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} cannot be memory-mapped: {error}. --no-mmap-bin-files reads by plain reads."
            ) from None

    def _shrunk(self, size: int) -> ValueError:
        return ValueError(
            f"{self.path} shrank while it was in use: it has {size} bytes now, and had {self.size} when it was opened."
        )


def _map(descriptor: int, size: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        # Without a second descriptor for every map.
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
