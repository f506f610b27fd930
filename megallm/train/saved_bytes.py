"""Counts the bytes that autograd keeps between forward and backward passes."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """While it is entered, every tensor that is saved for a backward pass is counted, by storage, until it is let go.

    Args:
        known: tensors whose storages are there anyway (parameters, buffers, a batch) and do not count.

    Attributes:
        current, peak: bytes of the storages that are kept now, and at most so far.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._holders: dict[int, int] = {}
        self.current = 0
        self.peak = 0
        self._hooks = saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _keep(self, tensor: torch.Tensor) -> _Kept:
        return _Kept(self, tensor)

    def count(self, tensor: torch.Tensor, by: int) -> None:
        """Takes note of one holder more (1) or less (-1) of a tensor's storage."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._known:
            return
        before = self._holders.get(address, 0)
        if before + by == 0:
            del self._holders[address]
            self.current -= storage.nbytes()
        else:
            self._holders[address] = before + by
            self.current += storage.nbytes() if before == 0 else 0
            self.peak = max(self.peak, self.current)


class _Kept:
    """Stands for one saved tensor in the graph, and goes with it."""

    def __init__(self, owner: SavedBytes, tensor: torch.Tensor) -> None:
        self.owner, self.tensor = owner, tensor
        owner.count(tensor, 1)

    def __del__(self) -> None:
        self.owner.count(self.tensor, -1)
