"""Which checkpoints are kept once a newer one is on the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megallm.checkpoint.commit import checkpoint_folder, remove_folder, temporary_folder
from megallm.checkpoint.manifest import MANIFEST
from megallm.failpoint import passing

# One of them may turn out to be damaged.
ALWAYS_KEPT = 2
_FOLDER = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Retention:
    """What is kept; without a number, everything is.

    Attributes: `keep_last`, how many of the newest; `retain_interval`, whose multiples stay for good; `save_interval`
    and `non_persistent_interval`: where the latter is given, checkpoints at other than multiples of the former go once
    there are newer ones.
    """

    keep_last: int | None = None
    retain_interval: int | None = None
    save_interval: int | None = None
    non_persistent_interval: int | None = None

    def surplus(self, iterations: Iterable[int], newest: int) -> list[int]:
        """Iterations whose checkpoints may go now that `newest` is on the disk; never one of the last two.

        Checkpoints behind `newest` are those of a run that went back: they are neither counted nor removed.
        """
        own = sorted((iteration for iteration in iterations if iteration <= newest), reverse=True)
        num_persistent, removed = 0, []
        for number, iteration in enumerate(own):
            persists = self._persists(iteration)
            kept = (
                number < ALWAYS_KEPT
                or bool(self.retain_interval and iteration % self.retain_interval == 0)
                or (persists and (num_persistent < self.keep_last if self.keep_last else not self.retain_interval))
            )
            num_persistent += persists
            if not kept:
                removed.append(iteration)
        return removed

    def _persists(self, iteration: int) -> bool:
        if self.non_persistent_interval is None:
            return True
        return self.save_interval is not None and iteration % self.save_interval == 0


def prune(root: str, retention: Retention, newest: int, token: str) -> tuple[str, ...]:
    """Removes the checkpoints under `root` that are surplus. `token` names the save that made them so.

    Returns a sentence for each that cannot be removed.
    """
    notes = []
    found = [
        int(match[1])
        for path in Path(root).glob("iter_*")
        if (match := _FOLDER.fullmatch(path.name)) and (path / MANIFEST).exists()
    ]
    for iteration in retention.surplus(found, newest):
        folder = checkpoint_folder(root, iteration)
        thrown_away = temporary_folder(folder, token)
        try:
            # Half removed, it must not look like a checkpoint.
            with passing("checkpoint.prune.rename"):
                os.rename(folder, thrown_away)
            with passing("checkpoint.prune.remove"):
                remove_folder(thrown_away)
        except OSError as error:
            notes.append(f"the old checkpoint {folder} could not be removed: {error.strerror or error}")
    return tuple(notes)
