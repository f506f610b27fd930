"""Processes that read ahead into memory which they share with the process that trains.

Forked, so that an open dataset needs no second opening and nothing is pickled. Arrays travel through shared memory that
is laid out once (no file, so that the size of /dev/shm does not matter); a pipe in each direction says, a byte at a
time, that a slot is full or free again.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from megallm.data.open_files import check_process_count

_ALIGNMENT = 64
_FULL, _END, _FAILED = b"f", b"e", b"!"
# A worker whose parent is gone without closing its pipes (another child may hold them) notices after so long.
_SECONDS_BETWEEN_LOOKS = 5.0


class ReadingWorkers:
    """Reads by `num_workers` processes, in the order of one.

    Iterating gives what the `worker`-th iterator of `read` gives, in turn: item i comes from worker i % num_workers.
    Every item is a dict of arrays of the names, dtypes and shapes of `form`, overwritten once the next item is asked
    for. Each worker is up to `depth` items ahead. Iterating and closing belong to the process that made them.

    An iterator that ends ends the reading. A ValueError or OSError of an iterator is raised here as a ValueError with
    its sentence, any other error as a RuntimeError with its name, the end of a process as a ValueError.

    Memory: num_workers * depth * (bytes of an item), shared. The processes also keep what they inherit: pages which
    this process changes later are then there twice.
    """

    def __init__(
        self,
        read: Callable[[int], Iterator[dict[str, np.ndarray]]],
        form: dict[str, np.ndarray],
        num_workers: int,
        depth: int,
    ) -> None:
        check_process_count("--num-workers", num_workers)
        self._read, self._depth = read, depth
        self._form = {name: (array.dtype, array.shape, array.nbytes) for name, array in form.items()}
        self._slot_bytes = sum(_aligned(size) for _, _, size in self._form.values())
        self._workers: list[_Worker] = []
        try:
            for number in range(num_workers):
                self._workers.append(_Worker(self._slot_bytes * depth))
                self._workers[-1].start(partial(self._work, number))
        except OSError as error:
            self.close()
            raise ValueError(
                f"a process that reads data ahead cannot be started ({error}): give fewer --num-workers"
            ) from error

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        item = 0
        while True:
            turn, number = divmod(item, len(self._workers))
            worker = self._workers[number]
            if not worker.wait_for_item():
                return
            yield self._slot(worker, turn % self._depth)
            worker.free_slot()
            item += 1

    def close(self) -> None:
        """Ends the processes. Closing twice does nothing."""
        for worker in self._workers:
            worker.end()

    def _slot(self, worker: _Worker, slot: int) -> dict[str, np.ndarray]:
        arrays, offset = {}, slot * self._slot_bytes
        for name, (dtype, shape, size) in self._form.items():
            arrays[name] = np.ndarray(shape, dtype, worker.memory, offset)
            offset += _aligned(size)
        return arrays

    def _work(self, number: int) -> None:
        """In the worker's process: fills one free slot after another."""
        worker = self._workers[number]
        for turn, arrays in enumerate(self._read(number)):
            if turn >= self._depth and not worker.wait_for_slot():
                return
            assert arrays.keys() == self._form.keys(), f"arrays {set(arrays)} instead of {set(self._form)}"
            for name, room in self._slot(worker, turn % self._depth).items():
                array = arrays[name]
                assert array.shape == room.shape and array.dtype == room.dtype, (
                    f"{name} is {array.dtype} {array.shape}, and was {room.dtype} {room.shape} before"
                )
                room[...] = array
            worker.say(_FULL)
        worker.say(_END)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Worker:
    """One process with its memory and its two pipes; each end is closed where it is not used."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, max(1, num_bytes))
        self._pid: int | None = None
        self._parent = os.getpid()
        self._read_end = self._write_end = -1

    def start(self, work: Callable[[], None]) -> None:
        """Forks the process, which does `work` and ends."""
        items, say = os.pipe()
        free, give = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            for end in (items, say, free, give):
                os.close(end)
            raise
        if pid == 0:
            os.close(items)
            os.close(give)
            self._read_end, self._write_end = free, say
            _work_and_exit(work, self)
        os.close(say)
        os.close(free)
        self._pid, self._read_end, self._write_end = pid, items, give

    def wait_for_item(self) -> bool:
        """Whether the next slot is full, or else the iterator's end. Raises what the process failed with."""
        word = os.read(self._read_end, 1)
        if word == _FAILED:
            kind, _, sentence = self._rest().partition("\n")
            if kind in ("ValueError", "OSError"):
                raise ValueError(sentence)
            raise RuntimeError(f"a process that reads data ahead failed with {kind}: {sentence}")
        if word == b"":
            raise ValueError(f"a process that reads data ahead {self._what_ended_it()}")
        return word == _FULL

    def free_slot(self) -> None:
        """Lets the process fill the slot that was read."""
        # A process that has ended needs no slot: its last items and its message are still in the pipe.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._write_end, b"+")

    def end(self) -> None:
        """Ends the process at once: it holds nothing that needs an orderly end."""
        if self._pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._reap()
        os.close(self._read_end)
        os.close(self._write_end)

    def wait_for_slot(self) -> bool:
        """In the process: whether there is a free slot, or else nobody left to read it."""
        # Not select(), which takes no descriptor above 1,023: a blend may hold thousands of files open.
        ready = select.poll()
        ready.register(self._read_end, select.POLLIN)
        while not ready.poll(1000 * _SECONDS_BETWEEN_LOOKS):
            if os.getppid() != self._parent:
                return False
        return os.read(self._read_end, 1) != b""

    def say(self, word: bytes) -> None:
        """In the process: tells the other end."""
        os.write(self._write_end, word)

    def _rest(self) -> str:
        with os.fdopen(os.dup(self._read_end), "rb") as stream:
            return stream.read().decode(errors="replace")

    def _reap(self) -> int:
        assert self._pid is not None, "the process was started"
        pid, self._pid = self._pid, None
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:
            return 0

    def _what_ended_it(self) -> str:
        code = self._reap()
        os.close(self._read_end)
        os.close(self._write_end)
        if code == -signal.SIGKILL:
            return "was killed (signal 9), as a system does that runs out of memory: give fewer --num-workers"
        if code == -signal.SIGBUS:
            return "was ended by signal 7: a data file has become shorter, or its disk fails"
        return f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"


def _work_and_exit(work: Callable[[], None], worker: _Worker) -> NoReturn:
    """In the process: `work`, its error told to the other end, and an exit that runs nothing of the parent's."""
    code = 1
    try:
        # Ctrl-C reaches all processes of a terminal: the parent decides. Its other handlers mean nothing here.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Destroying inherited objects, of a GPU for example, is the parent's business.
        gc.disable()
        # The parent's threads are not here: an operation that would share work among them would wait for ever.
        torch.set_num_threads(1)
        work()
        code = 0
    except BrokenPipeError:
        pass
    except BaseException as error:
        kind = "OSError" if isinstance(error, OSError) else type(error).__name__
        kind = "ValueError" if isinstance(error, ValueError) else kind
        with contextlib.suppress(OSError):
            worker.say(_FAILED + f"{kind}\n{error}".encode())
    finally:
        os._exit(code)
