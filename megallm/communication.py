"""Process groups as the engine sees them: every message of the engine goes through a `Group` or a `Channel`.

A group of one process communicates with nobody, so that call sites need no branch for an axis of size 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist

from megallm.journal import Journal, Operation

# torch renamed these two; both spellings occur within the supported range of versions.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Work:
    """An operation under way. `wait()` returns when its result may be used; waiting twice is allowed."""

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self._wait = wait

    def wait(self) -> None:
        if self._wait is not None:
            self._wait()
            self._wait = None


class Transport:
    """Starts operations on one process group, in order.

    `delay`, used by tests, gives the seconds by which each asynchronous operation is late. A delayed operation runs in
    a thread of its own, so that whoever uses a result before waiting for it, or changes a buffer that is still being
    sent, gets wrong numbers.

    On gloo, tensors on a GPU are copied to the host and back: this lets several processes share one GPU.

    `journal` keeps note of every operation under the group's `name`.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        delay: Callable[[], float] | None = None,
        name: str = "",
        journal: Journal | None = None,
    ) -> None:
        self.process_group = process_group
        self.name = name
        self.journal = journal or Journal()
        self.delay = delay
        self.staged = process_group is not None and dist.get_backend(process_group) == "gloo"
        self._thread = ThreadPoolExecutor(max_workers=1) if delay is not None else None

    def start(self, operation: Callable[[bool], object], asynchronous: bool, name: str = "message") -> Work:
        """Runs `operation(asynchronous)`, which calls torch and returns torch's work handle or None.

        Raises CommunicationError, here or in the work's `wait`, where another process is gone or comes too late.
        """
        entry = self.journal.begin(name, self.name)
        if self._thread is not None and self.delay is not None:
            late = self.delay() if asynchronous else 0.0
            future: Future[object] = self._thread.submit(self._run_late, late, operation)
            if asynchronous:
                return self._work(entry, future.result)
            self.journal.wait(entry, future.result)
            return Work()
        handle = self.journal.wait(entry, lambda: operation(asynchronous))
        return self._work(entry, handle.wait) if asynchronous and handle is not None else Work()

    def stages(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` goes through a copy in the host's memory."""
        return self.staged and tensor.is_cuda

    def _work(self, entry: Operation, wait: Callable[[], object]) -> Work:
        return Work(lambda: self.journal.wait(entry, wait))

    @staticmethod
    @torch.no_grad()
    def _run_late(seconds: float, operation: Callable[[bool], object]) -> None:
        time.sleep(seconds)
        operation(False)

    def close(self) -> None:
        """Lets go of the process group, whose threads end with the last reference to it. Nothing may use it after."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        del self.process_group


class Group:
    """The processes along one axis of the mesh, or several, that this rank belongs to.

    Attributes: `ranks`, global ranks in order; `rank`, this process's index among them; `size`.
    """

    def __init__(self, ranks: tuple[int, ...], global_rank: int, transport: Transport) -> None:
        self.ranks = ranks
        self.rank = ranks.index(global_rank)
        self.size = len(ranks)
        self._transport = transport

    def all_reduce(self, tensor: torch.Tensor, reduction: str = "sum", asynchronous: bool = False) -> Work:
        """Reduces `tensor` over the group in place. `reduction` is "sum" or "max"."""
        if self.size == 1:
            return Work()
        self._check_contiguous(tensor)
        return self._collective(
            lambda sent, late: dist.all_reduce(
                sent[0], op=_REDUCTIONS[reduction], group=self._transport.process_group, async_op=late
            ),
            [tensor],
            outputs=[0],
            asynchronous=asynchronous,
            name="all_reduce",
        )

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool = False) -> Work:
        """Concatenates every member's `input` along the first dim into `output`, which has size times its elements."""
        self._check_sizes(output, input)
        if self.size == 1:
            if output.data_ptr() != input.data_ptr():
                output.copy_(input.view_as(output))
            return Work()
        gather = _gather_by_swap if self._transport.staged and self.size == 2 else _all_gather
        return self._collective(
            lambda sent, late: gather(sent[0], sent[1], group=self._transport.process_group, async_op=late),
            [output, input],
            outputs=[0],
            asynchronous=asynchronous,
            name="all_gather",
        )

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool = False) -> Work:
        """Sums `input` over the group and leaves this member's equal part, along the first dim, in `output`."""
        self._check_sizes(input, output)
        if self.size == 1:
            if output.data_ptr() != input.data_ptr():
                output.copy_(input.view_as(output))
            return Work()
        reduce_scatter = _sum_exchanged_parts if self._transport.staged else _reduce_scatter
        return self._collective(
            lambda sent, late: reduce_scatter(sent[0], sent[1], group=self._transport.process_group, async_op=late),
            [output, input],
            outputs=[0],
            asynchronous=asynchronous,
            name="reduce_scatter",
        )

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrites `tensor` with that of the member whose index in the group is `source`."""
        if self.size == 1:
            return
        self._check_contiguous(tensor)
        self._collective(
            lambda sent, late: dist.broadcast(
                sent[0], src=self.ranks[source], group=self._transport.process_group, async_op=late
            ),
            [tensor],
            outputs=[0],
            asynchronous=False,
            name="broadcast",
        ).wait()

    def barrier(self) -> None:
        """Returns when every member has come here."""
        if self.size > 1:
            self._transport.start(
                lambda late: dist.barrier(group=self._transport.process_group, async_op=late), False, "barrier"
            ).wait()

    def _collective(
        self,
        operation: Callable[[list[torch.Tensor], bool], object],
        tensors: list[torch.Tensor],
        outputs: list[int],
        asynchronous: bool,
        name: str,
    ) -> Work:
        if not self._transport.stages(tensors[0]):
            return self._transport.start(lambda late: operation(tensors, late), asynchronous, name)
        host = [tensor.to("cpu", copy=True) for tensor in tensors]
        work = self._transport.start(lambda late: operation(host, late), asynchronous, name)

        def finish() -> None:
            work.wait()
            for index in outputs:
                tensors[index].copy_(host[index])

        staged = Work(finish)
        if not asynchronous:
            staged.wait()
        return staged

    def _check_contiguous(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous(), "a collective works in place and needs a contiguous tensor"

    def _check_sizes(self, large: torch.Tensor, small: torch.Tensor) -> None:
        self._check_contiguous(large)
        self._check_contiguous(small)
        assert large.numel() == self.size * small.numel() and large.dtype == small.dtype, (
            f"a group of {self.size} needs {self.size} x {small.numel()} elements of {small.dtype}, "
            f"got {large.numel()} of {large.dtype}"
        )


class Channel:
    """One direction between two processes: messages arrive in the order in which they were sent."""

    def __init__(self, source: int, destination: int, tag: int, transport: Transport) -> None:
        self.source = source
        self.destination = destination
        self._tag = tag
        self._transport = transport

    def send(self, tensor: torch.Tensor) -> Work:
        """Starts sending; `tensor` must not change before the work is waited for."""
        sent = tensor.detach()
        if self._transport.stages(sent):
            sent = sent.to("cpu", copy=True)
        name = f"send to rank {self.destination}"
        return self._transport.start(lambda late: self._post(dist.isend, sent, self.destination, late), True, name)

    def receive(self, tensor: torch.Tensor) -> Work:
        """Starts receiving into `tensor`, which holds the message once the work is waited for."""
        assert tensor.is_contiguous(), "a message is received into contiguous memory"
        staged = self._transport.stages(tensor)
        target = torch.empty_like(tensor, device="cpu") if staged else tensor
        name = f"receive from rank {self.source}"
        work = self._transport.start(lambda late: self._post(dist.irecv, target, self.source, late), True, name)
        if not staged:
            return work

        def finish() -> None:
            work.wait()
            tensor.copy_(target)

        return Work(finish)

    def _post(self, operation: Callable[..., dist.Work | None], tensor: torch.Tensor, peer: int, late: bool) -> object:
        handle = operation(tensor, peer, group=self._transport.process_group, tag=self._tag)
        assert handle is not None, "only the two ends of a channel use it"
        if late:
            return handle
        handle.wait()
        return None


# On gloo, exchanging parts and adding them up here mostly takes less processor time than its own reduce-scatter (half
# of it with four ranks), and swapping two parts less than its all-gather. Both are called like torch's functions.


def _sum_exchanged_parts(
    output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool
) -> Work:
    """Reduce-scatter: every member receives the parts meant for it and adds them up in the order of the ranks."""
    received = torch.empty_like(input)
    exchange = dist.all_to_all_single(received, input, group=group, async_op=async_op)

    def finish() -> None:
        if exchange is not None:
            exchange.wait()
        parts = received.view(dist.get_world_size(group), -1)  # [size, elements of a part]
        torch.sum(parts, dim=0, out=output.view(-1))

    work = Work(finish)
    if not async_op:
        work.wait()
    return work


def _gather_by_swap(
    output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool
) -> dist.Work | None:
    """All-gather in a group of two: each sends its part to the other, and nothing to itself."""
    rank = dist.get_rank(group)
    parts = output.view(2, -1)
    own, others = parts[rank], parts[1 - rank]
    splits = [0, 0]
    splits[1 - rank] = input.numel()
    swap = dist.all_to_all_single(others, input.view(-1), splits, splits, group=group, async_op=async_op)
    if own.data_ptr() != input.data_ptr():
        own.copy_(input.view(-1))
    return swap
