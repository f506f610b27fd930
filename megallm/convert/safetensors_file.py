"""Files of safetensors: where their tensors lie, and new ones written as a stream."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint.manifest import DTYPES
from megallm.convert.raw import PIECE_BYTES, RawTensor, bytes_of

_LENGTH_BYTES = 8
# The library reads no longer header either.
_MOST_HEADER_BYTES = 100_000_000
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > min(size, _MOST_HEADER_BYTES):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        return {
            name: _raw(path, name, row, _LENGTH_BYTES + length, size)
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


def write_file(
    path: Path,
    declared: Sequence[Declared],
    tensors: Iterable[torch.Tensor],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes `tensors`, as they were declared and in that order, and flushes the file to the disk.

    `advance` is told the bytes of each.

    Raises:
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        write_all(descriptor, memoryview(_header(declared)))
        for one, tensor in zip(declared, tensors, strict=True):
            found = (tensor.dtype, tuple(tensor.shape))
            assert found == (one.dtype, one.shape), f"{one.name} is {found}, declared as {one}"
            write_all(descriptor, bytes_of(tensor))
            advance(one.num_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """Writes all bytes, however few the system takes at a time."""
    while data:
        data = data[os.write(descriptor, data[:PIECE_BYTES]) :]


def _header(declared: Sequence[Declared]) -> bytes:
    # The loaders of transformers look for the format.
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for one in declared:
        end = begin + one.num_bytes
        rows[one.name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
