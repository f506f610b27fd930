"""The steps of a save on the disk, in the order that keeps a checkpoint whole or absent whenever they end:

1. a folder of a name that no other save has (`iter_0000100.TOKEN.tmp`);
2. each rank's file and the list of what is in it, flushed to the disk;
3. the manifest, which has the lists of all ranks, and the names of the files, flushed to the disk;
4. the rename to `iter_0000100`: the commit;
5. the names in the folder above flushed to the disk; then the tracker file, which is only a hint.

A checkpoint of the same iteration steps aside first, as `iter_0000100.replaced`, and counts until the new one is there.
Where one of that name is left which cannot be removed, it is `iter_0000100.replaced2` and so on: the last one counts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint.boxes import LocalBox
from megallm.checkpoint.manifest import MANIFEST, join_rows, most_bytes, rows_to_json, to_json
from megallm.checkpoint.shard_file import size_of, write_shard
from megallm.checkpoint.stream import flush
from megallm.failpoint import passing

TRACKER = "latest_checkpointed_iteration.txt"
REPLACED = re.compile(r"\.replaced(\d*)\Z")
"""What the name of a checkpoint that steps aside ends with."""
_TEMPORARY = re.compile(r"iter_\d{7,}\.[0-9a-f]{16}\.tmp")


def checkpoint_folder(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lives."""
    return Path(root) / f"iter_{iteration:07d}"


def temporary_folder(final: Path, token: str) -> Path:
    """Where a checkpoint is written, or thrown away; what is left there is removed by the next save."""
    return final.with_name(f"{final.name}.{token}.tmp")


def begin(temporary: Path, needed: int) -> tuple[str, ...]:
    """The first rank: clears what killed saves have left, sees that there is space, and makes the folder.

    Returns a sentence for each thing that could not be cleared: this save has other names.

    Raises:
        OSError: that cannot be done.
        ValueError: fewer than `needed` bytes are free.
    """
    root = temporary.parent
    make_folder(root)
    notes = _remove_leftovers(root)
    free = shutil.disk_usage(root).free
    if needed > free:
        sentences = [f"it takes {needed:,} bytes, and {root} has {free:,} free", *notes]
        raise ValueError("; ".join(sentences))
    with passing("checkpoint.folder.create"):
        temporary.mkdir()
    return notes


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, so that they are there after a power cut. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder with all in it; of one that is a link to another place, the link. Raises OSError."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def replaced_number(name: str) -> int:
    """How late a checkpoint of this folder's name has stepped aside, from 1; 0 for one that has not."""
    found = REPLACED.search(name)
    return int(found[1] or 1) if found else 0


def _remove_leftovers(root: Path) -> tuple[str, ...]:
    """Gives a sentence for each that stays."""
    notes = []
    # The last one that stepped aside is the one that counts.
    for path in sorted(root.glob("iter_*"), key=lambda path: replaced_number(path.name), reverse=True):
        final = path.with_name(REPLACED.sub("", path.name))
        try:
            if final != path and not (final / MANIFEST).exists():
                # Its save ended between the two renames.
                os.rename(path, final)
            elif final != path or _TEMPORARY.fullmatch(path.name):
                with passing("checkpoint.leftovers.remove"):
                    remove_folder(path)
        except OSError as error:
            notes.append(_stays(path, error))
    return tuple(notes)


def _aside(final: Path) -> Path:
    """A name under which the checkpoint `final` may step aside."""
    number = 1 + max((replaced_number(path.name) for path in final.parent.glob(f"{final.name}.replaced*")), default=0)
    return final.with_name(f"{final.name}.replaced{number if number > 1 else ''}")


def write_rank(
    temporary: Path, boxes: Sequence[LocalBox], rank: int, tensors: Iterable[torch.Tensor] | None = None
) -> None:
    """Each rank: its file, as `write_shard` makes it, and the list of what is in it.

    Raises ValueError where the disk does not take them.
    """
    # Where machines share no folder, only the first one has made it; the committer will miss what is written here.
    temporary.mkdir(parents=True, exist_ok=True)
    path = temporary / f"rank_{rank:05d}.safetensors"
    try:
        rows = rows_to_json(*write_shard(path, boxes, rank, tensors))
        with passing("checkpoint.rows.write"):
            path.with_suffix(".json").write_text(json.dumps(rows))
    except OSError as error:
        free = shutil.disk_usage(temporary).free
        raise ValueError(
            f"{path} could not be written: {error.strerror}; it takes {size_of(boxes):,} bytes, and {free:,} are free"
        ) from None


def commit(
    temporary: Path, final: Path, iteration: int, token: str, state: dict[str, Any], num_ranks: int
) -> tuple[str, ...]:
    """The first rank, once all have written: the manifest, the rename, the tracker.

    Returns a sentence where the checkpoint that stepped aside stays.

    Raises:
        OSError: a step failed. Where that was the last ones, after the rename, the checkpoint is there.
        ValueError: some ranks' files are not in the folder.
    """
    lists = [temporary / f"rank_{rank:05d}.json" for rank in range(num_ranks)]
    missing = [path.stem for path in lists if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(lists)} ranks' files are not in {temporary}, {missing[0]}'s for one: --save must "
            "be a folder that all machines share"
        )
    rows = join_rows(json.loads(path.read_bytes()) for path in lists)
    with passing("checkpoint.rows.remove"):
        for path in lists:
            path.unlink()
    text = to_json(iteration, token, state, rows)
    described = sum(file[1] for file in rows["files"])
    if len(text) > most_bytes(described):
        raise ValueError(
            f"its manifest takes {len(text)} bytes, and readers allow {most_bytes(described)} for files of {described} "
            "bytes: the model has too many small tensors for so many ranks"
        )
    with passing("checkpoint.manifest.write"):
        (temporary / MANIFEST).write_bytes(text)
    with passing("checkpoint.manifest.fsync"):
        flush(temporary / MANIFEST)
    with passing("checkpoint.folder.fsync"):
        flush(temporary)
    if final.exists() and not (final / MANIFEST).exists():
        # Damaged, or another program's: nothing that a save may throw away.
        os.rename(final, final.with_name(f"{final.name}.{token}.not_ours"))
    replaced = _aside(final)
    if final.exists():
        with passing("checkpoint.folder.replace"):
            os.rename(final, replaced)
    try:
        with passing("checkpoint.folder.rename"):
            os.rename(temporary, final)
    except OSError:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        raise
    with passing("checkpoint.parent.fsync"):
        flush(final.parent)
    _write_tracker(final.parent, iteration)
    if not replaced.exists():
        return ()
    try:
        with passing("checkpoint.replaced.remove"):
            remove_folder(replaced)
    except OSError as error:
        return (_stays(replaced, error),)
    return ()


def _stays(path: Path, error: OSError) -> str:
    return f"{path}, left by an earlier save, cannot be removed: {error.strerror or error}"


def _write_tracker(root: Path, iteration: int) -> None:
    written = root / (TRACKER + ".tmp")
    try:
        with passing("checkpoint.tracker.write"):
            written.write_text(str(iteration))
            flush(written)
        with passing("checkpoint.tracker.rename"):
            os.replace(written, root / TRACKER)
            flush(root)
    finally:
        written.unlink(missing_ok=True)
