"""Loading under any layout: every rank reads, from whichever files hold them, the parts of its boxes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.save import FORMAT, MANIFEST, MANIFEST_KEYS, TRACKER, checkpoint_folder


@dataclass(frozen=True)
class _SavedBox:
    file: Path
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def find_checkpoint(root: str) -> Path | None:
    """The checkpoint to continue from under `root`, or None if nothing was ever saved there.

    It is the one that the tracker file names, or the newest one where there is no tracker. `root` may also be a
    checkpoint's own folder. Raises ValueError where something was saved but cannot be used: starting afresh would
    overwrite it.
    """
    if Path(root).exists() and not Path(root).is_dir():
        raise ValueError(f"--load {root} is not a folder")
    if (Path(root) / MANIFEST).exists():
        return Path(root)
    # The pattern leaves out folders that are still being written.
    folders = sorted(Path(root).glob("iter_*[0-9]"))
    complete = [folder for folder in folders if (folder / MANIFEST).exists()]
    known = f"complete here: {complete[-1].name}" if complete else "nothing here is complete"
    tracker = Path(root) / TRACKER
    if tracker.exists():
        text = tracker.read_text().strip()
        named = checkpoint_folder(root, int(text)) if text.isdigit() else None
        if named is None or named not in complete:
            raise ValueError(
                f"{tracker} names {text!r}, which is no complete checkpoint ({known}). Write another iteration into "
                "it, or give another folder to start afresh"
            )
        return named
    if folders and not complete:
        raise ValueError(f"{folders[-1]} has no {MANIFEST}: it is damaged. Give another folder to start afresh")
    return complete[-1] if complete else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Iteration, counters and configuration of a checkpoint. Raises ValueError if the folder is not one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a readable checkpoint: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{folder / MANIFEST} has format {found!r}; this version reads {FORMAT!r}")
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
        raise ValueError(f"{folder / MANIFEST} lacks {', '.join(missing)}: it was changed after it was saved")
    return manifest


@torch.no_grad()
def load_boxes(folder: Path, boxes: Iterable[LocalBox]) -> None:
    """Fills the boxes' tensors from a checkpoint.

    Raises ValueError where the checkpoint lacks a tensor or has it in another shape.
    """
    saved = _read_index(folder, read_manifest(folder)["num_files"])
    with ExitStack() as files:
        _fill(folder, boxes, saved, files)


def _fill(folder: Path, boxes: Iterable[LocalBox], saved: dict[str, list[_SavedBox]], files: ExitStack) -> None:
    handles: dict[Path, Any] = {}
    for box in boxes:
        sources = saved.get(f"{box.kind}/{box.name}")
        if sources is None:
            raise ValueError(f"{folder} holds no {box.kind} of {box.name}: is it a checkpoint of another model?")
        extent = _extent(sources)
        if extent != box.global_shape:
            raise ValueError(
                f"{folder} holds {box.kind} of {box.name} with shape {extent}, but this model wants "
                f"{box.global_shape}: the model that was saved has another shape. "
                "Give the same model flags as the run that saved it."
            )
        filled = 0
        for source in sources:
            filled += _copy_overlap(box, source, handles, files)
        if filled != box.tensor.numel():
            raise ValueError(
                f"{folder} holds {filled} of {box.tensor.numel()} elements of {box.kind} of {box.name} "
                f"at {box.offset}: a part is missing"
            )


def _read_index(folder: Path, num_files: int) -> dict[str, list[_SavedBox]]:
    files = sorted(folder.glob("rank_*.safetensors"))
    if len(files) != num_files:
        raise ValueError(f"{folder} holds {len(files)} of the {num_files} files that its manifest counts")
    index: dict[str, list[_SavedBox]] = {}
    for file in files:
        try:
            saved = _boxes_in(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        for name, box in saved:
            index.setdefault(name, []).append(box)
    return index


def _boxes_in(file: Path) -> list[tuple[str, _SavedBox]]:
    boxes = []
    with safe_open(file, framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 (not a dict)
            name, place = key.rsplit("@", 1)
            offset = tuple(int(start) for start in place.split(","))
            boxes.append((name, _SavedBox(file, key, offset, tuple(handle.get_slice(key).get_shape()))))
    return boxes


def _extent(sources: list[_SavedBox]) -> tuple[int, ...]:
    """The shape that the saved boxes of a tensor span together."""
    ends = [[start + length for start, length in zip(box.offset, box.shape, strict=True)] for box in sources]
    return tuple(max(dim) for dim in zip(*ends, strict=True))


def _copy_overlap(box: LocalBox, source: _SavedBox, handles: dict[Path, Any], files: ExitStack) -> int:
    """Copies what a saved box and a local box share; returns the number of elements."""
    shape = tuple(box.tensor.shape)
    begin = [max(a, b) for a, b in zip(box.offset, source.offset, strict=True)]
    end = [min(a + n, b + m) for a, n, b, m in zip(box.offset, shape, source.offset, source.shape, strict=True)]
    if any(first >= last for first, last in zip(begin, end, strict=True)):
        return 0
    if source.file not in handles:
        handles[source.file] = files.enter_context(safe_open(source.file, framework="pt"))
    there = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, source.offset, strict=True))
    here = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, box.offset, strict=True))
    box.tensor[here].copy_(handles[source.file].get_slice(source.key)[there])
    return math.prod(b - a for a, b in zip(begin, end, strict=True))
