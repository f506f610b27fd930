"""Files of safetensors as they are written from their beginning on: the header, and the disk at work beside us."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint.manifest import CHUNK_BYTES, DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
# What one write to a file takes, and one read.
PIECE_BYTES = 16 * CHUNK_BYTES
# After so much the disk is set to work: by itself the system may wait until all is written.
_FLUSHED_BYTES = 64 * CHUNK_BYTES


def safetensors_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]], metadata: dict[str, str] | None = None
) -> bytes:
    """What stands before (name, type, shape, bytes) of each tensor in its order.

    The length of a JSON object, uint64 little-endian, and the object, padded to a multiple of 8.
    """
    rows: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for name, dtype, shape, num_bytes in tensors:
        assert name not in rows, f"{name} is there twice"
        end = begin + num_bytes
        rows[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


class Flushing:
    """Has the disk work on a file that is written, while the rest of it is still being made.

    A large file then takes its time from the disk alone. To be used in a `with` block, within which the file is open.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pending_bytes = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Flushing:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def wrote(self, num_bytes: int) -> None:
        """So many bytes more are written. Raises OSError for what went wrong in the background."""
        self._pending_bytes += num_bytes
        if self._pending_bytes < _FLUSHED_BYTES:
            return
        if self._under_way is not None:
            if not self._under_way.done():
                return
            # The system tells of an error once.
            self._under_way.result()
        self._pending_bytes = 0
        self._under_way = self._thread.submit(os.fsync, self._descriptor)

    def finish(self) -> None:
        """Returns when all is on the disk. Raises OSError, also for what went wrong in the background."""
        if self._under_way is not None:
            self._under_way.result()
        os.fsync(self._descriptor)


def flush(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
