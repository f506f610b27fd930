"""The folder beside the output in which a job works, and the lock that keeps a second job away."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from megallm.data.prepare.parts import Parts
from megallm.data.text.inputs import WORK_FOLDER_ENDING

# What a file system answers that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class WorkFolder:
    """`<output_prefix>.preprocessing/`: part files, journal and lock of one job.

    The lock is the operating system's, on an open file: it ends with the process, however that ends.

    Attributes: `path`; `parts` for each key; `journal_path`; `conditions_path`, of all that the output depends on.

    Raises:
        ValueError: another job is at work there, or the folder cannot be made.
    """

    def __init__(self, output_prefix: str, num_keys: int) -> None:
        self.path = work_folder_path(output_prefix)
        self.journal_path = self.path / "journal.json"
        self.conditions_path = self.path / "conditions.json"
        self._lock_path = self.path / "lock"
        try:
            self._lock = self._take_lock()
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror}.") from None
        self.parts = [Parts(self.path, number) for number in range(num_keys)]

    def _take_lock(self) -> int:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # a job that ends right now has removed the folder
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise ValueError(
                    f"Another job is writing this output: {self.path} is locked. Wait for its end, or choose another "
                    "--output-prefix."
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(lock)
                    raise
            # The job that held the lock may have removed this very file at its end.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self._lock_path)):
                    return lock
            os.close(lock)

    def size(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.path.iterdir())

    def close(self) -> None:
        """Leave everything as it is, for a later start."""
        for parts in self.parts:
            parts.close()
        os.close(self._lock)

    def clear(self) -> None:
        """Remove what an earlier job left, but for the lock."""
        # The journal goes first: a journal without its parts would be taken for damage.
        self.journal_path.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path != self._lock_path:
                path.unlink()

    def remove(self) -> None:
        """Remove the folder."""
        for parts in self.parts:
            parts.close()
        with suppress(OSError):
            self.clear()
            self._lock_path.unlink()
            self.path.rmdir()
        os.close(self._lock)


def work_folder_path(output_prefix: str) -> Path:
    return Path(f"{output_prefix}{WORK_FOLDER_ENDING}")
