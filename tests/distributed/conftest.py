from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.checkpoint_runs import SavedRuns
from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def saved_runs(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> SavedRuns:
    return SavedRuns(pool, tmp_path_factory.mktemp("checkpoints"))
