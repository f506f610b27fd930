"""Encoding in several processes, with the results in the order of the input."""

import queue
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from megallm.data.open_files import check_process_count
from megallm.data.prepare.encoding import Encoded, EncodeSettings
from megallm.data.prepare.pieces import Input, Piece
from megallm.data.prepare.worker import Worker

# Pieces that each worker may have waiting, being worked on, or done and not yet written.
PIECES_PER_WORKER = 3


class Pool:
    """Worker processes, and a thread for each that waits for its answers. Leaving the block ends all of them.

    The processes are fresh ones: tokenizer libraries hold threads, which do not survive a fork.

    Raises:
        ValueError: there may not be so many processes.
    """

    def __init__(self, settings: EncodeSettings, source: Input, workers: int) -> None:
        check_process_count("--workers", workers)
        self._workers: list[Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(Worker(settings, source))
        except BaseException:
            self._kill()
            raise
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Threads that wait for an answer get the end of the line instead.
        self._kill()
        self._threads.shutdown(cancel_futures=True)

    def wait_until_ready(self) -> None:
        """Return when every worker has its tokenizer."""
        for worker in self._workers:
            worker.wait_until_ready()

    def encode_all(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Encoded]]:
        """Every piece with what became of it, in order, with a bounded number of pieces under way.

        Raises:
            ValueError: as `Worker.encode`.
        """
        under_way: deque[tuple[Piece, Future[Encoded]]] = deque()
        for piece in pieces:
            under_way.append((piece, self._threads.submit(self._encode, piece)))
            if len(under_way) == PIECES_PER_WORKER * len(self._workers):
                first, future = under_way.popleft()
                yield first, future.result()
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()

    def _encode(self, piece: Piece) -> Encoded:
        worker = self._idle.get()
        try:
            return worker.encode(piece)
        finally:
            self._idle.put(worker)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
