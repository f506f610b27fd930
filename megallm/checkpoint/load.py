"""Loading under any layout: every rank reads, from whichever files hold them, the parts of its boxes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.commit import REPLACED, checkpoint_folder, replaced_number
from megallm.checkpoint.manifest import MANIFEST, DamagedError, Manifest, SavedFile, read_manifest
from megallm.checkpoint.reading import SLAB_BYTES, OpenCheckpoint
from megallm.checkpoint.shard_file import ShardReader

Result = TypeVar("Result")

_FOLDER = re.compile(r"iter_(\d{7,})(" + REPLACED.pattern + ")?")


def find_checkpoints(root: str, iteration: int | None = None) -> list[Path]:
    """The committed checkpoints under `root`, or that of one iteration, the newest first; none if nothing is there.

    A folder with a manifest under its final name is committed; whether it is undamaged shows when it is read. `root`
    may also be a checkpoint's own folder. Raises ValueError where something was saved but is not committed, the
    iteration is not there, or a model in another format is: nobody who names it wants to start afresh.
    """
    top = Path(root)
    if top.exists() and not top.is_dir():
        raise ValueError(f"{root} is not a folder")
    if (top / MANIFEST).exists():
        return [top]
    found: dict[int, Path] = {}
    broken = []
    for folder in sorted(top.glob("iter_*"), key=lambda folder: (-replaced_number(folder.name), folder.name)):
        match = _FOLDER.fullmatch(folder.name)
        if match and (folder / MANIFEST).exists():
            # One that stepped aside counts as long as its successor is not there, which comes behind it here.
            if not replaced_number(folder.name) or int(match[1]) not in found:
                found[int(match[1])] = folder
        elif match:
            broken.append(folder)
    if iteration is not None:
        if iteration not in found:
            there = f"the iterations there are {', '.join(map(str, sorted(found)))}" if found else "there is none"
            raise ValueError(f"{checkpoint_folder(root, iteration)} is not there, or has no {MANIFEST}: {there}")
        return [found[iteration]]
    if not found:
        _refuse_other_formats([top, top / "release", *broken])
    if broken and not found:
        raise ValueError(f"{broken[-1]} has no {MANIFEST}: it is damaged. Give another folder to start afresh")
    for folder in broken:
        match = _FOLDER.fullmatch(folder.name)
        assert match is not None, "its name was matched before"
        if int(match[1]) > max(found):
            # No ended save leaves this. Whoever reads it is told that it is damaged, and may choose the one before.
            found[int(match[1])] = folder
    return [found[number] for number in sorted(found, reverse=True)]


def _refuse_other_formats(folders: Sequence[Path]) -> None:
    for folder in folders:
        if (folder / "config.json").exists() and any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            raise ValueError(
                f"{folder} is a Hugging Face model and no checkpoint: give it to --load-hf, or convert it with "
                "tools/convert_checkpoint.py --from hf --to megallm"
            )
        if (folder / ".metadata").exists() or any(folder.glob("mp_rank_*")):
            raise ValueError(
                f"{folder} was saved by Megatron: convert it with tools/convert_checkpoint.py --from megatron "
                "--to megallm"
            )


def newest_sound(
    folders: Sequence[Path], allow_fallback: bool, look: Callable[[Path], Result]
) -> tuple[Path, Result, list[str]]:
    """The newest of some checkpoints, what `look` gives of it, and sentences that its user should read.

    Where `look` raises DamagedError, the one before takes its place if `allow_fallback` says so.

    Raises ValueError where that is not allowed, or DamagedError where there is none before.
    """
    notes: list[str] = []
    for folder, older in zip(folders, [*folders[1:], None], strict=True):
        try:
            return folder, look(folder), notes
        except DamagedError as error:
            if older is None:
                raise
            if not allow_fallback:
                raise ValueError(f"{error}. --allow-fallback continues from {older.name} instead") from None
            notes.append(f"{error}. Going back to {older.name}, as --allow-fallback says")
    raise AssertionError("there is a checkpoint")


def newest_checkpoint(root: str, iteration: int | None = None) -> Path:
    """The newest checkpoint under `root`, or that of one iteration. Raises ValueError where there is none."""
    found = find_checkpoints(root, iteration)
    if not found:
        raise ValueError(f"{root} holds no complete checkpoint: a folder iter_... with a manifest")
    return found[0]


def load_boxes(folder: Path, manifest: Manifest, boxes: Iterable[LocalBox]) -> None:
    """Fills the boxes' tensors from a checkpoint, as `OpenCheckpoint.fill` does.

    Raises:
        DamagedError: the checkpoint is not as it was written.
        ValueError: it lacks a tensor or has it in another shape.
    """
    with OpenCheckpoint(folder, manifest) as checkpoint:
        for box in boxes:
            saved = checkpoint.saved(box.kind, box.name)
            if saved.shape != box.global_shape:
                raise ValueError(
                    f"{folder} holds {box.kind} of {box.name} with shape {saved.shape}, but this model wants "
                    f"{box.global_shape}: the model that was saved has another shape. "
                    "Give the same model flags as the run that saved it."
                )
            checkpoint.start_filling(box.kind, box.name, box.offset, box.tensor)
        checkpoint.wait()


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
    largest = max((box.num_bytes for tensor in manifest.tensors.values() for box in tensor.boxes), default=0)
    piece = memoryview(bytearray(min(SLAB_BYTES, largest)))
    for number, file in enumerate(manifest.files):
        with ShardReader(folder, file) as reader:
            reader.check_header()
            for name, tensor in manifest.tensors.items():
                for box in tensor.boxes:
                    if box.file == number:
                        for at in range(0, box.num_bytes, SLAB_BYTES):
                            reader.read(name, box, at, piece[: box.num_bytes - at])
        yield folder / file.name, file.num_bytes
