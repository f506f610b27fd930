"""Reading ahead of writing: in order, in bounded memory, and really ahead."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megallm.checkpoint.boxes import WEIGHTS, declared_box
from megallm.checkpoint.shard_file import write_shard
from megallm.convert import ahead
from megallm.convert.ahead import read_ahead
from megallm.convert.safetensors_file import Declared, read_header, write_file
from megallm.convert.torch_file import write_torch_file

COUNTS = (3, 40, 5, 5, 5, 90, 1, 90, 2, 60, 60)
SIZES = [4 * count for count in COUNTS]


class Source:
    """Makes tensors, and keeps account of those that somebody holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held = self.most = 0

    def read(self, number: int) -> torch.Tensor:
        tensor = torch.full((COUNTS[number],), float(number))
        self._account(SIZES[number])
        weakref.finalize(tensor, self._account, -SIZES[number])
        return tensor

    def _account(self, num_bytes: int) -> None:
        with self._lock:
            self.held += num_bytes
            self.most = max(self.most, self.held)


def to_safetensors(path: Path, tensors: Iterator[torch.Tensor]) -> None:
    write_file(path, [Declared(str(n), torch.float32, (count,)) for n, count in enumerate(COUNTS)], tensors)
    assert len(read_header(path)) == len(COUNTS)


def to_torch(path: Path, tensors: Iterator[torch.Tensor]) -> None:
    declared = [Declared(str(n), torch.float32, (count,)) for n, count in enumerate(COUNTS)]
    write_torch_file(path, lambda places: dict(places), declared, tensors)


def to_shard(path: Path, tensors: Iterator[torch.Tensor]) -> None:
    write_shard(path, [declared_box(WEIGHTS, str(n), torch.float32, (c,)) for n, c in enumerate(COUNTS)], 0, tensors)


@pytest.mark.parametrize("write", [to_safetensors, to_torch, to_shard])
@pytest.mark.parametrize("ahead_bytes", [0, 100, 10**6])
def test_no_more_is_held_than_the_largest_and_a_fixed_amount(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, Iterator[torch.Tensor]], None],
    ahead_bytes: int,
) -> None:
    monkeypatch.setattr(ahead, "AHEAD_BYTES", ahead_bytes)
    source, told = Source(), []
    with read_ahead(SIZES, source.read, told.append) as tensors:
        write(tmp_path / "file", tensors)
    assert max(SIZES) <= source.most <= max(SIZES) + ahead_bytes
    assert source.held == 0
    assert told == SIZES[: len(told)] and len(told) >= len(SIZES) - 1


def test_the_next_is_ready_while_one_is_written() -> None:
    ready = threading.Event()

    def read(number: int) -> torch.Tensor:
        if number == 2:
            ready.set()
        return torch.full((1,), float(number))

    with read_ahead([4] * 3, read, lambda num_bytes: None) as tensors:
        assert next(tensors) == 0
        assert ready.wait(timeout=30)
        assert [float(tensor) for tensor in tensors] == [1, 2]


def test_an_error_comes_where_its_tensor_would_have_been() -> None:
    def read(number: int) -> torch.Tensor:
        if number == 1:
            raise ValueError("the file ends too early")
        return torch.zeros(1)

    with read_ahead([4] * 3, read, lambda num_bytes: None) as tensors:
        assert next(tensors) == 0
        with pytest.raises(ValueError, match="ends too early"):
            next(tensors)
