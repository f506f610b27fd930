"""Checkpoints by the tensor, without a model: written from a stream, and any box of them read again."""

from __future__ import annotations

import errno
import random
import resource
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megallm.checkpoint import reading, stream
from megallm.checkpoint.boxes import WEIGHTS, declared_box
from megallm.checkpoint.load import find_checkpoints, verify
from megallm.checkpoint.manifest import CHUNK_BYTES, DamagedError
from megallm.checkpoint.reading import open_checkpoint
from megallm.checkpoint.save import save_stream

FIRST_MOMENT = "first_moment"
MATRIX = torch.arange(24, dtype=torch.float32).view(4, 6)
VECTOR = torch.arange(5, dtype=torch.float64)
HALF = torch.linspace(-1, 1, 6).to(torch.bfloat16).view(1, 2, 3)


def write(root: Path) -> Path:
    """The matrix comes in an upper half and two lower quarters."""
    boxes = [
        declared_box(WEIGHTS, "matrix", torch.float32, (4, 6), (0, 0), (2, 6)),
        declared_box(WEIGHTS, "vector", torch.float64, (5,)),
        declared_box(WEIGHTS, "matrix", torch.float32, (4, 6), (2, 3), (2, 3)),
        declared_box(FIRST_MOMENT, "half", torch.bfloat16, (1, 2, 3)),
        declared_box(WEIGHTS, "matrix", torch.float32, (4, 6), (2, 0), (2, 3)),
    ]
    tensors = (MATRIX[:2], VECTOR, MATRIX[2:, 3:], HALF, MATRIX[2:, :3])
    return save_stream(str(root), 7, [boxes], iter(tensors), {"config": {}}).folder


def test_a_stream_of_tensors_comes_back_whole(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert find_checkpoints(str(tmp_path)) == [folder]
    list(verify(folder))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.manifest.iteration == 7
        assert checkpoint.names() == ["matrix", "vector"]
        assert checkpoint.names(FIRST_MOMENT) == ["half"]
        found = dict(checkpoint.tensors())
        assert torch.equal(found["matrix"], MATRIX) and torch.equal(found["vector"], VECTOR)
        half = checkpoint.read(FIRST_MOMENT, "half")
        assert half.dtype == torch.bfloat16 and torch.equal(half, HALF)
        with pytest.raises(ValueError, match=r"iter_0000007 holds no weights of half"):
            checkpoint.read(WEIGHTS, "half")


@pytest.mark.parametrize(("offset", "shape"), [((1, 2), (2, 2)), ((3, 0), (1, 6)), ((0, 5), (4, 1)), ((2, 2), (0, 2))])
def test_any_box_is_read(tmp_path: Path, offset: tuple[int, int], shape: tuple[int, int]) -> None:
    wanted = MATRIX[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
    with open_checkpoint(write(tmp_path)) as checkpoint:
        assert torch.equal(checkpoint.read(WEIGHTS, "matrix", offset, shape), wanted)
        other = torch.full(shape, -1.0, dtype=torch.float64)
        checkpoint.fill(WEIGHTS, "matrix", offset, other)
        assert torch.equal(other, wanted.double())


def test_parts_of_chunks_of_large_tensors_are_read(tmp_path: Path) -> None:
    """Whole chunks go where they belong at once, others through a copy; columns row by row."""
    large = torch.arange(3 * 2**20, dtype=torch.float32).view(3 * 2**10, 2**10)
    boxes = [
        declared_box(WEIGHTS, "large", torch.float32, large.shape, (0, 0), (1000, 2**10)),
        declared_box(WEIGHTS, "large", torch.float32, large.shape, (1000, 0), (2072, 2**10)),
    ]
    folder = save_stream(str(tmp_path), 1, [boxes], (large[:1000], large[1000:]), {"config": {}}).folder
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read(WEIGHTS, "large"), large)
        for first, last in ((0, 256), (1, 3000), (999, 1001), (700, 1000), (1256, 1768), (1257, 1300), (2800, 3072)):
            rows = checkpoint.read(WEIGHTS, "large", (first, 0), (last - first, 2**10))
            assert torch.equal(rows, large[first:last]), (first, last)
            half = torch.empty(last - first, 2**10, dtype=torch.bfloat16)
            checkpoint.fill(WEIGHTS, "large", (first, 0), half)
            assert torch.equal(half, large[first:last].bfloat16()), (first, last)
            columns = checkpoint.read(WEIGHTS, "large", (first, 100), (last - first, 7))
            assert torch.equal(columns, large[first:last, 100:107]), (first, last)
            wide = torch.zeros(last - first, 2**11)
            checkpoint.fill(WEIGHTS, "large", (first, 0), wide[:, : 2**10])
            assert torch.equal(wide[:, : 2**10], large[first:last]) and not wide[:, 2**10 :].any()


@pytest.mark.parametrize("num_bytes", [5 * CHUNK_BYTES + 8, 40 * CHUNK_BYTES])
def test_pieces_begin_and_end_with_chunks(num_bytes: int) -> None:
    chance = random.Random(3)
    for _ in range(300):
        first = 8 * chance.randrange(num_bytes // 8)
        last = chance.choice([num_bytes, 8 * chance.randrange(first // 8 + 1, num_bytes // 8 + 1)])
        cuts = list(reading._cuts(first, last, num_bytes))
        assert (cuts[0][0], cuts[-1][1]) == (first, last)
        assert all(stop == start for (_, stop), (start, _) in pairwise(cuts))
        assert all(0 < stop - start <= reading.SLAB_BYTES for start, stop in cuts)
        assert all(start % CHUNK_BYTES == 0 for start, _ in cuts[1:])
        # Each chunk is read once.
        chunks = [range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)) for start, stop in cuts]
        assert sum(map(len, chunks)) == len(set().union(*chunks))


def test_a_box_that_is_not_in_the_tensor_is_refused(tmp_path: Path) -> None:
    with (
        open_checkpoint(write(tmp_path)) as checkpoint,
        pytest.raises(DamagedError, match=r"holds 2 of 4 elements of weights/matrix at \(3, 0\)"),
    ):
        checkpoint.read(WEIGHTS, "matrix", (3, 0), (2, 2))


def test_a_stream_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[torch.Tensor]:
        yield VECTOR
        raise ValueError("the source is damaged")

    boxes = [declared_box(WEIGHTS, name, torch.float64, (5,)) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"iter_0000007 cannot be saved: the source is damaged"):
        save_stream(str(tmp_path), 7, [boxes], tensors(), {"config": {}})
    assert list(tmp_path.iterdir()) == []


def test_another_tensor_than_was_declared_is_a_defect(tmp_path: Path) -> None:
    boxes = [declared_box(WEIGHTS, "vector", torch.float64, (5,))]
    for tensor in (VECTOR[:4], VECTOR.float()):
        with pytest.raises(AssertionError, match="was declared as"):
            save_stream(str(tmp_path), 7, [boxes], [tensor], {"config": {}})


def test_not_all_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_OPEN", 2)
    folder = write(tmp_path)
    with open_checkpoint(folder) as checkpoint:
        file = checkpoint.manifest.files[0]
        object.__setattr__(checkpoint.manifest, "files", (file,) * 5)
        for number in (0, 1, 0, 2, 3, 4, 0):
            checkpoint._reader(number)
            assert len(checkpoint._readers) <= 2
        assert list(checkpoint._readers) == [4, 0]


@pytest.mark.slow
def test_the_whole_is_never_in_memory(tmp_path: Path) -> None:
    """64 tensors of 16 MiB: a GiB goes through a quarter of that."""
    boxes = [declared_box(WEIGHTS, f"tensor{number}", torch.float32, (4, 2**20)) for number in range(64)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = (torch.full((4, 2**20), float(number)) for number in range(64))
    folder = save_stream(str(tmp_path), 1, [boxes], tensors, {"config": {}}).folder
    with open_checkpoint(folder) as checkpoint:
        for number, (_, tensor) in enumerate(checkpoint.tensors()):
            assert tensor[3, -1] == number
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


def test_an_error_of_the_disk_in_the_background_is_not_lost_among_later_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_FLUSHED_BYTES", 1)
    errors = [OSError(errno.EIO, "Input/output error")]

    def fsync(_: int) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr("os.fsync", fsync)
    with open(tmp_path / "file", "wb") as file, stream.Flushing(file.fileno()) as flushing:
        flushing.wrote(1)
        while not flushing._under_way.done():
            time.sleep(0.001)
        with pytest.raises(OSError, match="Input/output error"):
            flushing.wrote(1)
