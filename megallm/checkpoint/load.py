"""Loading under any layout: every rank reads, from whichever files hold them, the parts of its boxes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.commit import REPLACED, checkpoint_folder
from megallm.checkpoint.manifest import (
    DTYPES,
    MANIFEST,
    DamagedError,
    Manifest,
    SavedBox,
    SavedFile,
    SavedTensor,
    read_manifest,
)
from megallm.checkpoint.shard_file import ShardReader

# What one step of copying reads, rounded up to whole rows of a tensor.
SLAB_BYTES = 2**26
_FOLDER = re.compile(r"iter_(\d{7,})(" + re.escape(REPLACED) + ")?")


def find_checkpoints(root: str, iteration: int | None = None) -> list[Path]:
    """The committed checkpoints under `root`, or that of one iteration, the newest first; none if nothing is there.

    A folder with a manifest under its final name is committed; whether it is undamaged shows when it is read. `root`
    may also be a checkpoint's own folder. Raises ValueError where something was saved but is not committed, or the
    iteration is not there: starting afresh would overwrite it.
    """
    top = Path(root)
    if top.exists() and not top.is_dir():
        raise ValueError(f"--load {root} is not a folder")
    if (top / MANIFEST).exists():
        return [top]
    found: dict[int, Path] = {}
    broken = []
    for folder in sorted(top.glob("iter_*")):
        match = _FOLDER.fullmatch(folder.name)
        if match and (folder / MANIFEST).exists():
            # One that stepped aside counts as long as its successor is not there; it sorts behind it.
            found.setdefault(int(match[1]), folder)
        elif match:
            broken.append(folder)
    if iteration is not None:
        if iteration not in found:
            there = f"there are {', '.join(map(str, sorted(found)))}" if found else "there is none"
            raise ValueError(f"{checkpoint_folder(root, iteration)} is not there, or has no {MANIFEST}: {there}")
        return [found[iteration]]
    if broken and not found:
        raise ValueError(f"{broken[-1]} has no {MANIFEST}: it is damaged. Give another folder to start afresh")
    return [found[number] for number in sorted(found, reverse=True)]


@torch.no_grad()
def load_boxes(folder: Path, manifest: Manifest, boxes: Iterable[LocalBox]) -> None:
    """Fills the boxes' tensors from a checkpoint; elements are converted where the types differ.

    Every byte that is read is compared with its checksum. Only files that hold a part of a box are opened, and only the
    rows of a tensor that are needed are read, rounded to chunks that have a checksum.

    Raises:
        DamagedError: the checkpoint is not as it was written.
        ValueError: it lacks a tensor or has it in another shape.
    """
    with ExitStack() as stack:
        readers: dict[int, ShardReader] = {}
        for box in boxes:
            name = f"{box.kind}/{box.name}"
            tensor = manifest.tensors.get(name)
            if tensor is None:
                raise ValueError(f"{folder} holds no {box.kind} of {box.name}: is it a checkpoint of another model?")
            if tensor.shape != box.global_shape:
                raise ValueError(
                    f"{folder} holds {box.kind} of {box.name} with shape {tensor.shape}, but this model wants "
                    f"{box.global_shape}: the model that was saved has another shape. "
                    "Give the same model flags as the run that saved it."
                )
            filled = 0
            for source in tensor.boxes:
                for begin, end in _overlap(box, source):
                    if source.file not in readers:
                        readers[source.file] = stack.enter_context(ShardReader(folder, manifest.files[source.file]))
                    _copy(readers[source.file], name, tensor, source, box, begin, end)
                    filled += math.prod(b - a for a, b in zip(begin, end, strict=True))
            if filled != box.tensor.numel():
                raise DamagedError(
                    f"{folder} holds {filled} of {box.tensor.numel()} elements of {name} at {box.offset}"
                )


def check_files(folder: Path, files: Iterable[SavedFile]) -> None:
    """Raises DamagedError where a file is missing, or of another size or header. Reads no tensors."""
    for file in files:
        with ShardReader(folder, file) as reader:
            reader.check_header()


def verify(folder: Path) -> Iterator[tuple[Path, int]]:
    """Reads every byte of a checkpoint; gives each file that is whole, with its bytes.

    Raises:
        DamagedError: something is not as it was written, naming file and tensor.
    """
    manifest = read_manifest(folder)
    known = {MANIFEST, *(file.name for file in manifest.files)}
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if foreign:
        raise DamagedError(f"{folder} holds {foreign[0]}, which does not belong to it")
    for number, file in enumerate(manifest.files):
        with ShardReader(folder, file) as reader:
            reader.check_header()
            for name, tensor in manifest.tensors.items():
                for box in tensor.boxes:
                    if box.file == number:
                        for at in range(0, box.num_bytes, SLAB_BYTES):
                            reader.read(name, box, at, min(at + SLAB_BYTES, box.num_bytes))
        yield folder / file.name, file.num_bytes


def _overlap(box: LocalBox, source: SavedBox) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """First corner and the one behind the last of what a saved box and a local box share, if they do."""
    shape = tuple(box.tensor.shape)
    begin = tuple(max(a, b) for a, b in zip(box.offset, source.offset, strict=True))
    ends = zip(box.offset, shape, source.offset, source.shape, strict=True)
    end = tuple(min(a + n, b + m) for a, n, b, m in ends)
    if all(first < last for first, last in zip(begin, end, strict=True)):
        yield begin, end


def _copy(
    reader: ShardReader,
    name: str,
    tensor: SavedTensor,
    source: SavedBox,
    box: LocalBox,
    begin: tuple[int, ...],
    end: tuple[int, ...],
) -> None:
    """Copy what lies between two corners from a saved box to a local one, some rows at a time."""
    row_bytes = source.num_bytes // source.shape[0]
    step = max(1, SLAB_BYTES // row_bytes)
    there = tuple(slice(a - o, b - o) for a, b, o in zip(begin[1:], end[1:], source.offset[1:], strict=True))
    here = tuple(slice(a - o, b - o) for a, b, o in zip(begin[1:], end[1:], box.offset[1:], strict=True))
    for first in range(begin[0], end[0], step):
        last = min(first + step, end[0])
        row = first - source.offset[0]
        data = reader.read(name, source, row * row_bytes, (last - source.offset[0]) * row_bytes)
        # [rows, ...], as the source has them
        values = torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(last - first, *source.shape[1:])
        box.tensor[(slice(first - box.offset[0], last - box.offset[0]), *here)].copy_(values[(slice(None), *there)])
