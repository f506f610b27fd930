"""How many files this process may have open at once, and how many other processes it may start with them."""

from __future__ import annotations

import resource

# The ends that it keeps of the pipes to another, one in each direction, and files that are open for anything else.
_FILES_OF_A_PROCESS = 2
_OTHER_FILES = 64


def allow_files(count: int) -> int:
    """Raises the limit of open files of this process to `count`, or as far as it may. Returns how many it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def check_process_count(flag: str, number: int) -> None:
    """Raises ValueError where the `number` that `flag` asks for needs more open files than this process may have.

    That is told before the first one starts: the thousands that could be started would take minutes.
    """
    limit = allow_files(number * _FILES_OF_A_PROCESS + _OTHER_FILES)
    most = max(1, (limit - _OTHER_FILES) // _FILES_OF_A_PROCESS)
    if number > most:
        raise ValueError(
            f"{flag} {number}: {_FILES_OF_A_PROCESS} files are open for each of the processes, and `ulimit -Hn` allows "
            f"{limit:,} in all; give at most {most}"
        )
