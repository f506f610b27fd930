"""Saves of a run on a disk that is slow or refuses something: the run goes on, and says what it must."""

from __future__ import annotations

import errno
import os
import pkgutil
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.checkpoint import commit, save
from megallm.checkpoint.load import find_checkpoints, verify
from megallm.config import parse_arguments, resolve
from megallm.mesh import Mesh, MeshShape
from megallm.train import hugging_face
from megallm.train.engine import Engine
from megallm.train.loop import pretrain_on
from megallm.train.metrics import Reporter
from megallm.train.saving import Saving
from megallm.train.stopping import NOTHING, ExitCode, Wish
from megallm.train.tasks.gpt import GPTTask
from megallm.train.watch import watched
from tests.distributed.launch import TINY, without
from tests.distributed.parity import LLAMA, Case, make_engine
from tests.distributed.pool import WorkerPool


def engine_that_saves(rank: int, root: str, dp: int = 1, **settings: Any) -> Engine:
    return make_engine(rank, Case("", LLAMA | {"checkpoint.save": root} | settings, dp=dp))


@contextmanager
def saving_of(engine: Engine, lines: list[str]) -> Iterator[Saving]:
    reporter = Reporter(engine.config, engine.mesh.shape.world_size, False, engine.task.term_names)
    with Saving(engine, {}, reporter, lines.append) as saving:
        yield saving


def save_after(saving: Saving, engine: Engine, iteration: int) -> None:
    engine.progress.iteration = iteration
    saving.after_step(now=True, last=False, ask=lambda: NOTHING)
    saving.finish()


def save_on_a_slow_disk(rank: int, root: str, in_background: bool) -> list[str]:
    """A save for which one rank takes longer than messages may."""
    engine = engine_that_saves(rank, root, dp=2, **{"checkpoint.async_save": in_background})
    engine.mesh._timeout = timedelta(seconds=1)
    write, lines = save.write_rank, list[str]()

    def write_slowly(*arguments: Any) -> None:
        time.sleep(2.0 * rank)
        write(*arguments)

    with ExitStack() as stack:
        stack.callback(setattr, save, "write_rank", write)
        save.write_rank = write_slowly
        stack.enter_context(watched(engine.mesh, 1.0 / 60))
        save_after(stack.enter_context(saving_of(engine, lines)), engine, 4)
    engine.mesh.close()
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_may_take_longer_than_a_message(pool: WorkerPool, tmp_path: Path, in_background: bool) -> None:
    for lines in pool.run(2, save_on_a_slow_disk, str(tmp_path), in_background):
        assert f"saved {tmp_path}/iter_0000004 (" in lines[-1]
    list(verify(tmp_path / "iter_0000004"))


def test_a_progress_file_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    engine = engine_that_saves(0, str(tmp_path), **{"logging.log_progress": True})
    with saving_of(engine, lines) as saving:
        (tmp_path / "progress.txt").unlink()
        (tmp_path / "progress.txt").mkdir()
        save_after(saving, engine, 4)
    assert lines[0] == "progress.txt could not be written: Is a directory; training goes on"
    assert f"saved {tmp_path}/iter_0000004 (" in lines[1]


def test_what_cannot_be_removed_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    lines: list[str] = []
    engine = engine_that_saves(0, str(tmp_path))
    left = tmp_path / "iter_0000003.00000000000000aa.tmp"
    left.mkdir()
    with saving_of(engine, lines) as saving, monkeypatch.context() as patch:
        patch.setattr(commit, "remove_folder", refuse)
        for iteration in (4, 5):
            save_after(saving, engine, iteration)
    assert lines.count(f"{left}, left by an earlier save, cannot be removed: Permission denied") == 1
    assert len(lines) == 3 and len(find_checkpoints(str(tmp_path))) == 2
    shutil.rmtree(left)


def export_in_a_hurry(rank: int, root: str) -> list[str]:
    """A save and an export of which the second rank is told, after a question, that the run is to leave."""
    settings = {"checkpoint.save_hf": f"{root}/hf", "checkpoint.save_hf_interval": 2, "training.fp64": False}
    engine, lines = engine_that_saves(rank, root, dp=2, **settings), list[str]()
    answers = iter([NOTHING, Wish(True, "SIGTERM was received", ExitCode.UNFINISHED)])
    with saving_of(engine, lines) as saving, ExitStack() as stack:
        stack.callback(setattr, hugging_face, "_SECONDS_BETWEEN_QUESTIONS", hugging_face._SECONDS_BETWEEN_QUESTIONS)
        hugging_face._SECONDS_BETWEEN_QUESTIONS = 0.0
        engine.progress.iteration = 2
        saving.after_step(now=True, last=True, ask=lambda: NOTHING)
        assert not Path(root, "hf").exists(), "who leaves in a hurry does not export"
        engine.progress.iteration = 4
        saving.after_step(now=False, last=False, ask=lambda: next(answers))
        assert not list(Path(root, "hf").iterdir()) and next(answers, None) is None
        engine.mesh.world.barrier()
        assert saving.lacks_export()
        saving.export_if_missing(lambda: NOTHING)
        assert not saving.lacks_export()
    engine.mesh.close()
    return lines


@pytest.mark.slow
def test_an_export_ends_where_the_run_is_to_leave(pool: WorkerPool, tmp_path: Path) -> None:
    for lines in pool.run(2, export_in_a_hurry, str(tmp_path)):
        told = [line for line in lines if "Hugging Face" in line]
        assert f"did not write {tmp_path}/hf/iter_0000004 for Hugging Face to its end: SIGTERM" in told[0]
        assert f"wrote {tmp_path}/hf/iter_0000004 for Hugging Face" in told[1] and len(told) == 2
    assert (tmp_path / "hf" / "iter_0000004" / "config.json").exists()


def test_a_save_in_the_background_that_failed_is_tried_again_by_who_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export after it has already heard of the failure."""
    settings = {"checkpoint.async_save": True, "checkpoint.save_hf_interval": 2, "training.fp64": False}
    engine = engine_that_saves(0, str(tmp_path), **settings, **{"checkpoint.save_hf": str(tmp_path / "hf")})

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    lines: list[str] = []
    with saving_of(engine, lines) as saving:
        engine.progress.iteration = 2
        with monkeypatch.context() as patch:
            patch.setattr(save, "write_rank", fail)
            saving.after_step(now=False, last=False, ask=lambda: NOTHING)
        assert not find_checkpoints(str(tmp_path)) and "No space left on device" in lines[-1]
        saving.after_step(now=True, last=True, ask=lambda: NOTHING)
        saving.finish()
    (folder,) = find_checkpoints(str(tmp_path))
    list(verify(folder))


def run_and_be_told(rank: int, flags: list[str], place: str, number: int) -> ExitCode:
    """A run that gets a signal whenever it comes to a function."""
    function = pkgutil.resolve_name(place)

    def with_signal(*arguments: Any, **settings: Any) -> Any:
        os.kill(os.getpid(), number)
        return function(*arguments, **settings)

    config = resolve(parse_arguments([*without(TINY, "--fp64"), *flags], prog="test", description=""), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hugging_face, "_SECONDS_BETWEEN_QUESTIONS", 0.0)
        patch.setattr(place, with_signal)
        mesh = Mesh(MeshShape(), rank, torch.device("cpu"))
        return pretrain_on(mesh, config, GPTTask.from_config, time.monotonic())


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["2", "6"])
def test_who_is_terminated_in_an_export_leaves(pool: WorkerPool, tmp_path: Path, interval: str) -> None:
    flags = ["--save", str(tmp_path), "--save-hf", str(tmp_path / "hf"), "--save-hf-interval", interval]
    place = "megallm.train.hugging_face.write_folder"
    assert pool.run(1, run_and_be_told, flags, place, signal.SIGTERM) == [ExitCode.UNFINISHED]
    assert [folder.name for folder in find_checkpoints(str(tmp_path))] == [f"iter_000000{interval}"]
    assert not list((tmp_path / "hf").iterdir())
    # What is left undone at the end is begun, and interrupted, by the run that goes on.
    flags += ["--load", str(tmp_path)]
    if interval == "6":
        assert pool.run(1, run_and_be_told, flags, place, signal.SIGTERM) == [ExitCode.UNFINISHED]
        assert not list((tmp_path / "hf").iterdir())


@pytest.mark.slow
def test_a_save_that_is_asked_for_in_an_evaluation_keeps_nobody_from_leaving(pool: WorkerPool, tmp_path: Path) -> None:
    flags = ["--save", str(tmp_path), "--exit-interval", "3"]
    place = "megallm.train.evaluation.evaluate_step"
    assert pool.run(1, run_and_be_told, flags, place, signal.SIGUSR1) == [ExitCode.FINISHED]
    assert [folder.name for folder in find_checkpoints(str(tmp_path))] == ["iter_0000003"]


def run_terminated_at_the_end(rank: int, root: str) -> ExitCode:
    """A run that is told to end while its last checkpoint is written in the background."""
    flags = [*TINY, "--async-save", "--save", root]
    mesh = Mesh(MeshShape(), rank, torch.device("cpu"))
    write = save.write_rank

    def write_slowly(*arguments: Any) -> None:
        for _ in range(3):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    save.write_rank = write_slowly
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        config = resolve(parse_arguments(flags, prog="test", description=""), 1)
        return pretrain_on(mesh, config, GPTTask.from_config, time.monotonic())
    finally:
        save.write_rank = write
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.slow
def test_a_signal_during_the_last_save_leaves_it_whole(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(1, run_terminated_at_the_end, str(tmp_path)) == [ExitCode.FINISHED]
    list(verify(tmp_path / "iter_0000006"))
