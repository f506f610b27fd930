"""Files of safetensors: where their tensors lie, and new ones written as a stream."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from megallm.checkpoint.manifest import DTYPES
from megallm.checkpoint.stream import LENGTH_BYTES, PIECE_BYTES, Flushing, safetensors_header
from megallm.convert.raw import RawTensor, bytes_of

# The library reads no longer header either.
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Declared:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, RawTensor]:
    """The tensors of a file by their names. Raises ValueError where it is not a whole file of safetensors."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(LENGTH_BYTES)
            if first == b"version ":
                raise ValueError("it is a pointer of Git LFS, and `git lfs pull` fetches what it points to")
            length = int.from_bytes(first, "little")
            if length > min(size, _MOST_HEADER_BYTES):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        return {
            name: _raw(path, name, row, LENGTH_BYTES + length, size)
            for name, row in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole file of safetensors: {error}") from None


def _raw(path: Path, name: str, row: dict[str, Any], data_begin: int, size: int) -> RawTensor:
    dtype, shape = DTYPES.get(row["dtype"]), tuple(map(int, row["shape"]))
    begin, end = map(int, row["data_offsets"])
    if not 0 <= begin <= end <= size - data_begin:
        raise ValueError(f"{name} would end at byte {data_begin + end} of {size}")
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name} of shape {shape} has {end - begin} bytes")
    return RawTensor(path, data_begin + begin, dtype, shape)


def write_file(path: Path, declared: Sequence[Declared], tensors: Iterable[torch.Tensor]) -> None:
    """Writes `tensors`, as they were declared and in that order, and flushes the file to the disk.

    Nothing is kept of a tensor when the next is asked for.

    Raises:
        OSError: the file cannot be written.
    """
    # The loaders of transformers look for the format.
    header = safetensors_header(
        ((one.name, one.dtype, one.shape, one.num_bytes) for one in declared), metadata={"format": "pt"}
    )
    with open(path, "xb", buffering=0) as file, Flushing(file.fileno()) as flushing:
        write_all(file, memoryview(header), flushing)
        left = iter(declared)
        for tensor in tensors:
            one = next(left)
            found = (tensor.dtype, tuple(tensor.shape))
            assert found == (one.dtype, one.shape), f"{one.name} is {found}, declared as {one}"
            write_all(file, bytes_of(tensor), flushing)
            del tensor
        assert next(left, None) is None, f"{path} has fewer tensors than were declared"
        flushing.finish()


def write_all(file: IO[bytes], data: memoryview, flushing: Flushing) -> None:
    """Writes all bytes, however few the system takes at a time."""
    while data:
        count = file.write(data[:PIECE_BYTES])
        flushing.wrote(count)
        data = data[count:]
