"""Whether a process may start as many others as it is asked for."""

from __future__ import annotations

import resource

# The ends that it keeps of the pipes to another, one in each direction, and files that are open for anything else.
_FILES_OF_A_PROCESS = 2
_OTHER_FILES = 64


def check_process_count(flag: str, number: int) -> None:
    """Raises ValueError where the `number` that `flag` asks for needs more open files than this process may have.

    That is told before the first one starts: the thousands that could be started would take minutes.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, (limit - _OTHER_FILES) // _FILES_OF_A_PROCESS)
    if limit != resource.RLIM_INFINITY and number > most:
        raise ValueError(
            f"{flag} {number}: {_FILES_OF_A_PROCESS} files are open for each of the processes, and `ulimit -n` allows "
            f"{limit:,} in all; give at most {most}"
        )
