"""Tensors where they lie in files, whatever the files' format: read by the box, straight into memory that is there."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from megallm.checkpoint.stream import PIECE_BYTES

# What one step of copying reads where bytes cannot go straight to their place, rounded up to whole rows.
SLAB_BYTES = 2**26
# A process may often have no more than 1,024 files open, and a model lie in more.
_MOST_OPEN = 128


@dataclass(frozen=True)
class RawTensor:
    """A tensor in C order, little-endian, from byte `begin` of a file on; `dtype` None is one that torch lacks."""

    path: Path
    begin: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]


class RawFiles:
    """Reads boxes of raw tensors. To be used in a `with` block."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def __enter__(self) -> RawFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @torch.no_grad()
    def fill(self, raw: RawTensor, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Fills `tensor` with the box of its shape that begins at `offset`; converts where the types differ.

        Raises ValueError where the file cannot be read, or ends too early.
        """
        if raw.dtype is None:
            raise ValueError(f"{raw.path} holds a tensor of a type that is not one of weights")
        if not tensor.numel():
            return
        row_bytes = math.prod(raw.shape[1:]) * raw.dtype.itemsize
        rows = tensor.shape[0]
        is_whole_rows = tuple(tensor.shape[1:]) == raw.shape[1:]
        if is_whole_rows and tensor.is_contiguous() and tensor.dtype == raw.dtype:
            self._read(raw, offset[0] * row_bytes, tensor)
            return
        step = max(1, min(rows, SLAB_BYTES // row_bytes))
        slab = torch.empty((step, *raw.shape[1:]), dtype=raw.dtype)
        columns = tuple(slice(first, first + n) for first, n in zip(offset[1:], tensor.shape[1:], strict=True))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = slab[: last - first]
            self._read(raw, (offset[0] + first) * row_bytes, part)
            tensor[first:last].copy_(part[(slice(None), *columns)])

    def _read(self, raw: RawTensor, begin: int, tensor: torch.Tensor) -> None:
        data = bytes_of(tensor)
        descriptor = self._descriptor(raw.path)
        done = 0
        while done < len(data):
            at = raw.begin + begin + done
            try:
                got = os.preadv(descriptor, [data[done : done + PIECE_BYTES]], at)
            except OSError as error:
                raise ValueError(f"{raw.path} cannot be read at byte {at}: {error.strerror}") from None
            if got == 0:
                raise ValueError(f"{raw.path} ends at byte {at}, within a tensor: it is not whole")
            done += got

    def _descriptor(self, path: Path) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
            return self._descriptors[path]
        if len(self._descriptors) == _MOST_OPEN:
            os.close(self._descriptors.popitem(last=False)[1])
        try:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path} cannot be opened: {error.strerror}") from None
        return self._descriptors[path]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data
