"""How many datasets of a run have their files open at once."""

import resource
from collections import OrderedDict
from threading import Lock
from typing import Protocol

from megallm.data.open_files import allow_files

# Files and memory maps of one open dataset, and of the indices of its samples.
FILES_OF_A_DATASET = 8
# Linux lets a process have 65,530 maps unless told otherwise.
MOST_DATASETS = 4096


class Closable(Protocol):
    """Lets go of its files, and opens them again by itself when it is read."""

    def close(self) -> None: ...


class OpenDatasets:
    """Lets at most `limit` datasets keep their files open, those that were used last.

    A run may blend tens of thousands of datasets, where a process may have some thousands of files open: a usual limit
    is 1,024, which is raised here as far as it may be and as datasets need it. At most a quarter of what is allowed is
    used: others open files, too.
    """

    def __init__(self, limit: int | None = None) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = MOST_DATASETS if hard == resource.RLIM_INFINITY else hard // (4 * FILES_OF_A_DATASET)
        self._limit = limit or max(1, min(MOST_DATASETS, allowed))
        self._open: OrderedDict[Closable, None] = OrderedDict()
        # Datasets of a blend are built by several threads.
        self._lock = Lock()

    def used(self, dataset: Closable) -> None:
        """Notes that a dataset has opened its files or reads them; closes those that were not used for longest."""
        with self._lock:
            if dataset not in self._open:
                self._open[dataset] = None
                allow_files(4 * FILES_OF_A_DATASET * len(self._open))
            self._open.move_to_end(dataset)
            while len(self._open) > self._limit:
                self._open.popitem(last=False)[0].close()
