"""When and how a run writes its checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch

import megallm
from megallm.agreement import on_every_rank
from megallm.checkpoint.background import BackgroundSaver
from megallm.checkpoint.boxes import WEIGHTS, LocalBox, local_boxes
from megallm.checkpoint.commit import checkpoint_folder
from megallm.checkpoint.retention import Retention
from megallm.checkpoint.save import Saved, save_checkpoint
from megallm.config import to_dict
from megallm.config.tree import CheckpointConfig
from megallm.file_lock import LOCK
from megallm.mesh import Hosts
from megallm.train.engine import Engine
from megallm.train.metrics import Reporter
from megallm.train.progress import ProgressFile
from megallm.train.stopping import NOTHING, Ask, Wish

# A slow disk is no reason to end the job.
_LONGEST_SAVE = timedelta(days=1)


class SaveError(ValueError):
    """The last checkpoint of a run could not be written."""


def save_engine(engine: Engine, root: str, order: dict[str, str] | None = None, hosts: Hosts | None = None) -> Saved:
    """Saves weights, optimizer, progress and what the order of the data depends on. Called by all ranks.

    They wait for each other through `hosts`, or the mesh where that is not given.
    """
    boxes, state = content_of(engine, order or {})
    retention = retention_of(engine.config.checkpoint)
    return save_checkpoint(root, engine.progress.iteration, boxes, state, hosts or engine.mesh, retention)


class Saving:
    """Saves a run where its configuration says so, and when it is asked to: at once, or from a copy in the background.

    To be used in a `with` block, which ends when everything is on the disk. Where the configuration names no folder,
    nothing happens. Attribute `seconds`: the longest that a save has taken, from its beginning until it was on the
    disk.

    Ranks wait for each other as long as a disk takes, whatever limit there is for the messages of the training.
    """

    def __init__(self, engine: Engine, order: dict[str, str], reporter: Reporter, log: Callable[[str], None]) -> None:
        self._engine, self._order, self._reporter, self._log = engine, order, reporter, log
        self._settings = engine.config.checkpoint
        self._retention = retention_of(self._settings)
        self._last_saved = -1
        self._progress_file = ProgressFile(engine.config, engine.mesh, engine.progress)
        self._consumed: dict[int, int] = {}
        self._told: set[str] = set()
        self.seconds = self._export_seconds = 0.0
        self._file_system = _file_system(self._settings.save)
        self._hosts = engine.mesh.new_hosts(_LONGEST_SAVE) if self._settings.save else Hosts.alone()
        self._background: BackgroundSaver | None = None
        if self._settings.save and self._settings.async_save:
            # Its thread sends messages of its own.
            self._background = BackgroundSaver(engine.mesh.new_hosts(_LONGEST_SAVE), self._written)

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *_: object) -> None:
        if self._background is not None:
            self._background.close()

    def after_step(self, *, now: bool, last: bool, ask: Ask) -> Wish | None:
        """Saves where an interval, or `now`, says so; always after the `last` step before the run ends or leaves.

        Called by all ranks with the same arguments; does nothing a second time after the same step. `ask` is asked
        while a checkpoint is written for Hugging Face, too, which ends where the run is to leave. Returns the wish that
        has ended this, or none; None where nothing was done.

        Raises:
            SaveError: nothing can be written, and there will be no other chance. Else that is logged only.
        """
        done = self._engine.progress.iteration
        # Who is in a hurry has no time for a second form.
        exports = self._exports_after(done, last) and not (now and last)
        is_wanted = now or last or exports or self._saves_after(done)
        if not self._settings.save or not is_wanted or self._last_saved == done:
            return None
        self._reporter.flush()
        resume = self._reporter.pause()
        self._save(last)
        wish = self._export(last, ask) if exports and self._last_saved == done else NOTHING
        resume()
        return wish

    def expected_seconds(self, iteration: int) -> float:
        """How long `after_step` may take after a step that is not the last."""
        exports = self._exports_after(iteration, False)
        saves = exports or self._saves_after(iteration)
        return saves * self.seconds + exports * self._export_seconds

    def lacks_export(self) -> bool:
        """Whether the checkpoint of the last step is not there for Hugging Face, and should be. Called by all ranks."""
        folder, root, done = self._settings.save_hf, self._settings.save, self._engine.progress.iteration
        if not folder or not root:
            return False
        missing = torch.zeros(1)
        if self._hosts.world.rank == 0:
            checkpoint = checkpoint_folder(root, done)
            is_saved = self._last_saved == done or checkpoint.exists()
            missing += is_saved and not (Path(folder) / checkpoint.name).exists()
        self._hosts.world.all_reduce(missing, "max")
        return bool(missing.item())

    def export_if_missing(self, ask: Ask) -> Wish:
        """Does what a run in a hurry has left undone; gives the wish that has ended this, or none.

        Raises SaveError where that fails.
        """
        return self._export(True, ask) if self.lacks_export() else NOTHING

    def _saves_after(self, iteration: int) -> bool:
        intervals = (self._settings.save_interval, self._settings.non_persistent_save_interval)
        return any(interval and iteration % interval == 0 for interval in intervals)

    def _exports_after(self, iteration: int, last: bool) -> bool:
        interval = self._settings.save_hf_interval
        return bool(self._settings.save_hf) and (last or bool(interval and iteration % interval == 0))

    def finish(self) -> None:
        """Returns when everything is on the disk. Raises SaveError where the last save failed."""
        if self._background is not None:
            outcome = self._background.wait()
            if isinstance(outcome, ValueError):
                # Whoever is to leave after the same step tries again.
                self._last_saved = -1
                raise SaveError(str(outcome))

    @property
    def has_saved(self) -> bool:
        """Whether this run has begun to save a checkpoint."""
        return self._last_saved >= 0

    def _save(self, last: bool) -> None:
        engine, root = self._engine, self._settings.save
        assert root is not None, "there is a folder"
        begin = time.perf_counter()
        self._consumed[engine.progress.iteration] = engine.progress.consumed_samples
        try:
            on_every_rank(self._hosts, self._check_file_system)
            if self._background is None:
                saved = save_engine(engine, root, self._order, self._hosts)
                self._written(saved, time.perf_counter() - begin)
            else:
                boxes, state = content_of(engine, self._order)
                iteration = engine.progress.iteration
                self._background.start(root, iteration, boxes, state, self._retention)
                stall = time.perf_counter() - begin
                self._log(f"saving iteration {iteration} in the background; training waited {stall:.3f} s for the copy")
            self._last_saved = engine.progress.iteration
        except ValueError as error:
            # A full disk may have room again; a run that ends here has no other chance.
            if last:
                raise SaveError(str(error)) from None
            self._written(error, time.perf_counter() - begin)

    def _export(self, last: bool, ask: Ask) -> Wish:
        """Writes the checkpoint of this step for Hugging Face, too; gives the wish that has ended this, or none."""
        assert self._settings.save is not None, "there is a folder"
        begin = time.perf_counter()
        checkpoint = checkpoint_folder(self._settings.save, self._engine.progress.iteration)
        try:
            self.finish()
            from megallm.train.hugging_face import export

            folder, wish = export(self._engine, self._hosts, checkpoint, ask)
        except ValueError as error:
            if last:
                raise SaveError(str(error)) from None
            self._log(f"{error}; training goes on")
            return NOTHING
        seconds = time.perf_counter() - begin
        self._export_seconds = max(self._export_seconds, seconds)
        if wish.leaves:
            self._log(f"did not write {folder} for Hugging Face to its end: {wish.reason}")
        else:
            self._log(f"wrote {folder} for Hugging Face in {seconds:.2f} s")
        return wish

    def _written(self, outcome: Saved | ValueError, seconds: float) -> None:
        """Logs how a save went; with background saving, called by its thread once that is known."""
        if isinstance(outcome, ValueError):
            self._log(f"{outcome}; training goes on, and the next save tries again")
            return
        self.seconds = max(self.seconds, seconds)
        try:
            self._progress_file.saved(outcome.iteration, self._consumed.pop(outcome.iteration))
        except OSError as error:
            self._log(f"progress.txt could not be written: {error.strerror}; training goes on")
        gigabytes = outcome.num_bytes / 1e9
        self._log(f"saved {outcome.folder} ({gigabytes:.3f} GB, on the disk after {seconds:.2f} s)")
        for note in outcome.notes:
            # What is wrong with the folder is so at every save.
            if note not in self._told:
                self._told.add(note)
                self._log(note)

    def _check_file_system(self) -> None:
        """A folder whose mount is gone looks empty, and would fill the disk below."""
        root = self._settings.save
        if root is None or self._file_system is None or _file_system(root) == self._file_system:
            return
        # A file system that was mounted again may have another number; what this run left in it is still there then.
        if not (Path(root) / LOCK).exists():
            raise ValueError(
                f"--save {root} is not the folder that it was when the run began: is its file system still mounted?"
            )


def content_of(engine: Engine, order: dict[str, str]) -> tuple[list[LocalBox], dict[str, Any]]:
    """What this rank writes, and what goes into the manifest. Called by all ranks."""
    engine.reducer.finish_gather()
    progress, shape = engine.progress, engine.mesh.shape
    layout = {
        "tp": shape.tp,
        "pp": shape.pp,
        "virtual": engine.config.parallel.num_virtual_stages_per_pipeline_rank,
        "dp": shape.dp,
    }
    state = {
        "consumed_samples": progress.consumed_samples,
        "consumed_valid_samples": progress.consumed_valid_samples,
        "evaluation_due": progress.evaluation_due,
        "position": float(progress.position),
        "num_updates": float(progress.num_updates),
        "rates": engine.rates.state(),
        "loss_scale": engine.optimizer.loss_scale.state(),
        "config": to_dict(engine.config),
        "data_order": order,
        "saved": {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "megallm": megallm.__version__,
            "torch": torch.__version__,
            "world_size": shape.world_size,
            "layout": layout,
        },
    }
    boxes = local_boxes(engine.optimizer, engine.chunks, engine.mesh)
    with_optimizer = not engine.config.checkpoint.no_save_optim
    return [box for box in boxes if box.saves and (with_optimizer or box.kind == WEIGHTS)], state


def retention_of(settings: CheckpointConfig) -> Retention:
    """Which checkpoints a configuration keeps."""
    return Retention(
        keep_last=settings.save_keep_last,
        retain_interval=settings.save_retain_interval,
        save_interval=settings.save_interval,
        non_persistent_interval=settings.non_persistent_save_interval,
    )


def _file_system(folder: str | None) -> int | None:
    """The number of the file system that holds a folder; None where there is no folder."""
    try:
        return None if folder is None else os.stat(folder).st_dev
    except OSError:
        return None
