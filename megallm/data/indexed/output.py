"""The two files of a dataset that is being written: beside their places, moved there when both are whole."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from megallm.data.indexed.format import file_paths

BUFFER_BYTES = 1 << 20
# What a system answers whose disk, quota or limit on files is used up.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DatasetOutput:
    """Opens `<prefix>.bin` and `<prefix>.idx` under temporary names beside them; `commit` moves them to their places.

    Used as a context manager: leaving the block normally commits, an exception removes what was written. Writing goes
    on inside `writing()`, which turns errors of the disk into sentences.

    Attributes: `bin_path`, `idx_path`, where the files will stand; `bin`, `idx`, the opened files.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, path_prefix: str | os.PathLike[str]) -> None:
        self.bin_path, self.idx_path = file_paths(path_prefix)
        for path in (self.bin_path, self.idx_path):
            if path.is_dir():
                raise ValueError(f"{path} cannot be written: it is a folder.")
        # Two jobs that write the same dataset at the same time do not mix: the later commit stays.
        suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        self._temporaries = [path.with_name(path.name + suffix) for path in (self.bin_path, self.idx_path)]
        self._files: list[BinaryIO] = []
        self._finished = False
        with self.writing():
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            for path in self._temporaries:
                self._files.append(open(path, "xb", buffering=BUFFER_BYTES))  # noqa: SIM115  (closed in discard)
        self.bin, self.idx = self._files

    def __enter__(self) -> "DatasetOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    @contextmanager
    def writing(self, need: int | None = None) -> Iterator[None]:
        """Work on the files; when it fails they are removed.

        Args:
            need: bytes that both files will need, where that is known; otherwise what was written until the failure.

        Raises:
            ValueError: the disk is full, or the system refuses to write; names file, need and free space.
        """
        try:
            yield
        except OSError as error:
            so_far = sum(_size(path) for path in self._temporaries)
            self.discard()
            raise ValueError(self._sentence(error, so_far, need)) from None
        except BaseException:
            self.discard()
            raise

    def require(self, need: int) -> None:
        """Raise ValueError, with nothing left behind, when `need` more bytes do not fit on the disk."""
        with self.writing(need):
            if shutil.disk_usage(self.bin_path.parent).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish(self) -> None:
        """Bring both files to the disk, so that only the move remains: nothing can be written any more."""
        with self.writing():
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
        self._finished = True

    def commit(self) -> None:
        """Finish both files and move them to their places; an index is never seen beside tokens of another."""
        if not self._finished:
            self.finish()
        with self.writing():
            self.idx_path.unlink(missing_ok=True)
            os.replace(self._temporaries[0], self.bin_path)
            os.replace(self._temporaries[1], self.idx_path)
            sync_folder(self.bin_path.parent)

    def discard(self) -> None:
        """Remove what was written."""
        for file in self._files:
            # What is left in the buffer cannot be written to a full disk either.
            with suppress(OSError):
                file.close()
        for path in self._temporaries:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _sentence(self, error: OSError, so_far: int, need: int | None) -> str:
        if error.errno not in FULL_DISK:
            return f"{self.bin_path} cannot be written: {error.strerror}."
        free = shutil.disk_usage(self.bin_path.parent).free
        want = f"{so_far:,} bytes so far" if need is None else f"{need:,} bytes"
        return (
            f"{self.bin_path} cannot be written: {os.strerror(error.errno or 0)}. The dataset needs {want}; "
            f"{free:,} bytes are free in {self.bin_path.parent}, where nothing is left of it."
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; some file systems cannot, and need not."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
