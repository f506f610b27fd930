"""How many processes are worth it: measured on the first documents, or by the cores and the size of the input."""

import os
import time
from collections.abc import Callable, Sequence

from megallm.data.prepare.encoded_input import EncodedInput
from megallm.data.prepare.job import Job
from megallm.data.prepare.pieces import PIECE_BYTES
from megallm.data.text.inputs import STANDARD_INPUT


def usable_cores() -> int:
    """Cores that this process may run on, where the system tells; otherwise all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(job: Job) -> int:
    """One for each core, but not more than there are pieces of input; packed files count at their packed size."""
    paths = job.settings.paths
    if STANDARD_INPUT in paths:
        return usable_cores()
    shards = job.settings.shard.total if job.settings.shard else 1
    size = sum(path.stat().st_size for path in paths) // shards
    return max(1, min(usable_cores(), size // PIECE_BYTES))


def measure_workers(
    job: Job, counts: Sequence[int], max_documents: int, tell: Callable[[int, float, float], None]
) -> int:
    """Encode the first documents with each number of processes, writing nothing; gives the fastest number.

    Starting the processes does not count.

    Args:
        tell: called for each number with documents/s and MB/s.

    Raises:
        ValueError: there is no document, or the first ones are bad.
    """
    speeds: dict[int, float] = {}
    for count in counts:
        documents = size = 0
        with EncodedInput(job.encoder, job.settings.encode, job.source, count) as encoded_input:
            encoded_input.wait_until_ready()
            began = time.monotonic()
            for _, encoded in encoded_input.read(job.start):
                if encoded.stopped:
                    raise ValueError(encoded.bad[-1][1])
                documents += encoded.documents
                size += encoded.input_bytes
                if documents >= max_documents:
                    break
            seconds = time.monotonic() - began
        if documents == 0:
            raise ValueError("There is no document to measure with.")
        speeds[count] = size / seconds
        tell(count, documents / seconds, size / seconds / 1e6)
    return max(speeds, key=lambda count: speeds[count])
