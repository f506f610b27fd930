"""Reading ahead of writing: while one tensor goes to the disk, the next ones are already made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

# Beside the largest tensor.
AHEAD_BYTES = 2**28


@contextmanager
def read_ahead(
    sizes: Sequence[int], read: Callable[[int], torch.Tensor], advance: Callable[[int], None]
) -> Iterator[Iterator[torch.Tensor]]:
    """Tensors `read(0)`, `read(1)`, ... of `sizes` bytes, made one after another in a thread of their own.

    Those that are ready and the one that is given out have together no more bytes than the largest and AHEAD_BYTES, if
    whoever takes one lets go of it before the next: then `advance` is told its bytes. What `read` raises comes where
    its tensor would have been.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        yield _in_order(thread, sizes, read, advance)
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def _in_order(
    thread: ThreadPoolExecutor,
    sizes: Sequence[int],
    read: Callable[[int], torch.Tensor],
    advance: Callable[[int], None],
) -> Iterator[torch.Tensor]:
    most_bytes = max(sizes, default=0) + AHEAD_BYTES
    under_way: deque[Future[torch.Tensor]] = deque()
    held = begun = 0
    for size in sizes:
        while begun < len(sizes) and held + sizes[begun] <= most_bytes:
            under_way.append(thread.submit(read, begun))
            held += sizes[begun]
            begun += 1
        yield under_way.popleft().result()
        held -= size
        advance(size)
