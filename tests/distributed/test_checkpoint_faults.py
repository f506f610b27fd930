"""Whatever happens to a save, to the disk or to a file: the checkpoint before or the new one, whole, or a sentence."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from megallm import failpoint
from megallm.checkpoint import commit, retention
from megallm.checkpoint import manifest as manifest_module
from megallm.checkpoint.background import BackgroundSaver
from megallm.checkpoint.boxes import LocalBox, declared_box, shard_boxes
from megallm.checkpoint.commit import TRACKER
from megallm.checkpoint.inspection import values_of
from megallm.checkpoint.load import check_files, find_checkpoints, load_boxes, verify
from megallm.checkpoint.manifest import CHUNK_BYTES, MANIFEST, DamagedError, digest, read_manifest
from megallm.checkpoint.reading import open_checkpoint
from megallm.checkpoint.save import Saved, save_stream
from megallm.checkpoint.shard_file import ShardReader
from megallm.train.engine import Engine
from megallm.train.resume import load_engine
from megallm.train.saving import content_of, retention_of, save_engine
from tests.distributed.parity import LLAMA, Case, make_engine
from tests.distributed.parity_cases import SHARDED
from tests.distributed.pool import WorkerPool

CASE = Case("", LLAMA | {"checkpoint.save_keep_last": 2}, dp=2, layout=SHARDED)
OLD, NEW = 2.0, 3.0
ONE_RANK_ONLY = "checkpoint.shard", "checkpoint.rows.write"
SAME_ITERATION_ONLY = "checkpoint.folder.replace", "checkpoint.replaced.remove"
NEXT_ITERATION_ONLY = "checkpoint.prune.rename", "checkpoint.prune.remove"
WARNED = "checkpoint.leftovers.remove", "checkpoint.replaced.remove"
"""What stays then is in nobody's way."""
COMMIT = list(failpoint.POINTS).index("checkpoint.folder.rename")


@pytest.fixture(scope="module")
def victims() -> Iterator[WorkerPool]:
    """Workers of our own: killing one replaces all of them."""
    workers = WorkerPool(2)
    yield workers
    workers.close()


def fill(engine: Engine, value: float) -> None:
    """Makes every saved number the same, so that a mixture shows."""
    for shard in engine.optimizer.shards:
        for tensor in (shard.master, shard.state.first_moment, shard.state.second_moment):
            tensor.fill_(value)


def save(rank: int, root: str, iteration: int, value: float, armed: str | None = None, background: bool = False) -> str:
    """Saves; gives the sentence with which that, or a part of it, failed."""
    os.environ["RANK"] = str(rank)
    os.environ.pop(failpoint.VARIABLE, None)
    engine = make_engine(rank, CASE)
    fill(engine, value)
    engine.progress.iteration = iteration
    if armed:
        os.environ[failpoint.VARIABLE] = armed
    try:
        saved = save_in_background(engine, root) if background else save_engine(engine, root)
        return " ".join(saved.notes)
    except ValueError as error:
        return str(error)
    finally:
        os.environ.pop(failpoint.VARIABLE, None)


def save_in_background(engine: Engine, root: str) -> Saved:
    """While the tensors are already other ones."""
    saver = BackgroundSaver(engine.mesh.new_hosts(), lambda outcome, seconds: None)
    boxes, state = content_of(engine, {})
    saver.start(root, engine.progress.iteration, boxes, state, retention_of(engine.config.checkpoint))
    fill(engine, -1.0)
    outcome = saver.wait()
    saver.close()
    engine.mesh.close()
    if isinstance(outcome, ValueError):
        raise outcome
    assert outcome is not None
    return outcome


def value_of(folder: Path) -> float:
    """The one number that all tensors of a checkpoint hold."""
    list(verify(folder))
    found = {
        value
        for file in folder.glob("*.safetensors")
        for tensor in load_file(file).values()
        for value in np.unique(tensor)
    }
    assert len(found) == 1, f"{folder} mixes saves: {found}"
    return found.pop()


@pytest.fixture(scope="module")
def saved_before(victims: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an old checkpoint of iteration 5, one before it that goes next, and what a killed save has left."""
    root = tmp_path_factory.mktemp("before")
    for number in (3, 5):
        assert victims.run(2, save, str(root), number, OLD) == ["", ""]
    shutil.copytree(root / "iter_0000005", root / "iter_0000005.00000000000000aa.tmp")
    return root


@pytest.fixture
def root(saved_before: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(saved_before, tmp_path / "checkpoints")


def assert_next_save_is_clean(victims: WorkerPool, root: Path, before: int) -> None:
    """Another save goes through and leaves nothing but the two newest checkpoints."""
    assert victims.run(2, save, str(root), 9, NEW) == ["", ""]
    names = {f"iter_{iteration:07d}" for iteration in (before, 9)}
    assert {path.name for path in root.iterdir()} == names | {TRACKER}
    assert (root / TRACKER).read_text() == "9"
    assert value_of(root / "iter_0000009") == NEW


def places(point: str) -> list[str]:
    """The failpoint before and after, on each rank that comes by; of several writes also a late one."""
    ranks = (0, 1) if point.startswith(ONE_RANK_ONLY) else (0,)
    counts = ("", "#7") if point == "checkpoint.shard.write" else ("",)
    return [f"{point}.{when}@{rank}{count}" for when in ("before", "after") for rank in ranks for count in counts]


PLACES = [(point, place) for point in failpoint.POINTS for place in places(point)]
HOW = ("next iteration", "same iteration", "in the background")


def reachable(point: str, how: str) -> bool:
    """Nothing steps aside for another iteration, and nothing goes where the number of checkpoints stays the same."""
    return point not in (NEXT_ITERATION_ONLY if how == "same iteration" else SAME_ITERATION_ONLY)


KILLS = [(point, place, how) for point, place in PLACES for how in HOW if reachable(point, how)]
# In the background kills before a place are enough, since each finds what one after the place before leaves.
KEPT = ".before@", "checkpoint.rows.write.after@1"
KILLS = [kill for kill in KILLS if kill[2] != "in the background" or any(kept in kill[1] for kept in KEPT)]


def test_every_failpoint_is_reached_by_some_kill() -> None:
    assert {point for point, _, _ in KILLS} == set(failpoint.POINTS)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "place", "how"), KILLS, ids=[f"{place} {how}" for _, place, how in KILLS])
def test_killed_there_the_old_or_the_new_one_is_whole(
    victims: WorkerPool, root: Path, point: str, place: str, how: str
) -> None:
    iteration = 5 if how == "same iteration" else 6
    # That the process dies there is what shows that the place is reached; the other one may be the first to tell.
    died = rf"rank {place.split('@')[1][0]} failed|process died|Connection (reset|closed) by peer"
    with pytest.raises(RuntimeError, match=died):
        victims.run(2, save, str(root), iteration, NEW, f"{place}=kill", how == "in the background")
    newest = find_checkpoints(str(root))[0]
    position = list(failpoint.POINTS).index(point)
    is_committed = COMMIT < position < list(failpoint.POINTS).index("checkpoint.leftovers.remove")
    is_committed |= place.startswith("checkpoint.folder.rename.after")
    assert value_of(newest) == (NEW if is_committed else OLD)
    assert_next_save_is_clean(victims, root, iteration if is_committed else 5)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize(
    ("point", "place"),
    [
        pair
        for pair in PLACES
        if ".before@" in pair[1] and reachable(pair[0], "same iteration") and pair[0] not in WARNED
    ],
)
def test_an_error_there_is_a_sentence_and_the_run_goes_on(
    victims: WorkerPool, root: Path, point: str, place: str, error: str
) -> None:
    said = victims.run(2, save, str(root), 5, NEW, f"{place}={error}")
    assert said[0] == said[1]
    assert "iter_0000005 cannot be saved" in said[0]
    assert os.strerror(getattr(errno, error)) in said[0]
    assert not [path for path in root.glob("*.tmp") if path.name != "iter_0000005.00000000000000aa.tmp"]
    newest = find_checkpoints(str(root))[0]
    assert value_of(newest) in (OLD, NEW)
    assert_next_save_is_clean(victims, root, 5)


@pytest.mark.slow
@pytest.mark.parametrize("point", NEXT_ITERATION_ONLY)
def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_the_new_one_counts(
    victims: WorkerPool, root: Path, point: str
) -> None:
    said = victims.run(2, save, str(root), 6, NEW, f"{point}.before=EIO")
    assert said == [f"the old checkpoint {root}/iter_0000003 could not be removed: Input/output error", ""]
    assert value_of(find_checkpoints(str(root))[0]) == NEW
    assert_next_save_is_clean(victims, root, 6)


def test_what_cannot_be_removed_is_in_no_saves_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remains of killed saves, a checkpoint that stepped aside and an old one that is surplus."""
    engine = make_engine(0, Case("", LLAMA | {"checkpoint.save_keep_last": 2}))
    for iteration in (1, 2, 3):
        engine.progress.iteration = iteration
        folder = save_engine(engine, str(tmp_path)).folder
    shutil.copytree(folder, tmp_path / "iter_0000003.00000000000000aa.tmp")
    shutil.copytree(folder, tmp_path / "iter_0000003.replaced")

    def refuse(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(commit, "remove_folder", refuse)
        patch.setattr(retention, "remove_folder", refuse)
        for iteration, value in ((3, OLD), (3, NEW), (4, NEW)):
            fill(engine, value)
            engine.progress.iteration = iteration
            notes = save_engine(engine, str(tmp_path)).notes
            assert value_of(find_checkpoints(str(tmp_path))[0]) == value
    stuck = ["iter_0000003.00000000000000aa.tmp", "iter_0000003.replaced", "iter_0000003.replaced2"]
    stuck += ["iter_0000003.replaced3"]
    said = [note for note in notes if "left by an earlier save, cannot be removed: Device or resource busy" in note]
    assert sorted(Path(note.split(",")[0]).name for note in said) == stuck
    assert "iter_0000002 could not be removed: Device or resource busy" in notes[-1]
    # Of those that stepped aside, the last one takes the place of a successor that did not come.
    shutil.rmtree(tmp_path / "iter_0000003")
    assert find_checkpoints(str(tmp_path), 3) == [tmp_path / "iter_0000003.replaced3"]
    assert value_of(tmp_path / "iter_0000003.replaced3") == OLD
    engine.progress.iteration = 5
    assert save_engine(engine, str(tmp_path)).notes == ()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000005"]


def test_saves_come_by_every_failpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the code, not only in the list above."""
    reached: set[str] = set()
    monkeypatch.setattr(failpoint, "_reach", reached.add)
    engine = make_engine(0, Case("", LLAMA | {"checkpoint.save_keep_last": 2}))
    (tmp_path / "iter_0000001.00000000000000aa.tmp").mkdir()
    for iteration in (1, 2, 3, 3):
        engine.progress.iteration = iteration
        save_engine(engine, str(tmp_path))
    assert reached == {f"{point}.{when}" for point in failpoint.POINTS for when in ("before", "after")}


def test_the_failpoints_are_listed_and_nonsense_is_refused() -> None:
    listed = subprocess.run([sys.executable, "-m", "megallm.failpoint"], capture_output=True, text=True, check=True)
    assert [line.split(".before")[0] for line in listed.stdout.splitlines()] == list(failpoint.POINTS)
    for wrong in ("checkpoint.shard.write=kill", "checkpoint.nothing.before=kill", "kill"):
        with pytest.raises(ValueError, match=r"names no failpoint"):
            failpoint._Armed(wrong)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(0, Case("", LLAMA))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"iter_0000000 cannot be saved: it takes [\d,]+ bytes, and .* has 1,000 free"):
        save_engine(engine, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_a_small_disk_that_fills_up(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed and free is said before a save; where it fills up meanwhile, the old checkpoint stays."""
    engine = make_engine(0, Case("", LLAMA))
    root, filler = small_disk / "checkpoints", small_disk / "filler"
    folder = save_engine(engine, str(root)).folder
    needed = sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - needed // 2))
    engine.progress.iteration = 1
    with pytest.raises(
        ValueError, match=r"iter_0000001 cannot be saved: it takes [\d,]+ bytes, and .* has [\d,]+ free"
    ):
        save_engine(engine, str(root))
    usage = shutil.disk_usage(small_disk)
    # Others write, too: what was free when the save began is not any more.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=usage.total))
        with pytest.raises(ValueError, match=r"rank_00000\.safetensors could not be written: No space left on device"):
            save_engine(engine, str(root))
    assert sorted(path.name for path in root.iterdir()) == [folder.name, TRACKER]
    assert shutil.disk_usage(small_disk).free == usage.free
    list(verify(folder))
    filler.unlink()
    assert load_engine(engine, str(root)) is not None
    engine.progress.iteration = 1
    list(verify(save_engine(engine, str(root)).folder))


# Damage


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Path]:
    """An engine, and two checkpoints of it with other numbers."""
    root = tmp_path_factory.mktemp("clean")
    engine = make_engine(0, Case("", LLAMA))
    for iteration in (1, 2):
        engine.progress.iteration = iteration
        for shard in engine.optimizer.shards:
            for tensor in (shard.master, shard.state.first_moment, shard.state.second_moment):
                tensor.uniform_()
        save_engine(engine, str(root))
    return engine, root


def refusal(folder: Path) -> str:
    with pytest.raises(DamagedError) as caught:
        list(verify(folder))
    return str(caught.value)


# Few tensors, so that thousands of loads take no time: whole ones, one in boxes, one of two chunks.
SMALL = [
    declared_box("weights", "table", torch.float32, (3, 96 * 1024)),
    declared_box("weights", "norm", torch.float64, (7,)),
    *(declared_box("first_moment", "cut", torch.bfloat16, (8, 5), (row, 0), (4, 5)) for row in (0, 4)),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = (torch.rand(box.tensor.shape, dtype=torch.float64).to(box.tensor.dtype) for box in SMALL)
    return save_stream(str(tmp_path_factory.mktemp("small")), 2, [SMALL], tensors, {"config": {}}).folder


def load_small(folder: Path) -> None:
    """As a rank does that holds another part: a whole tensor, some columns, some rows."""
    manifest = read_manifest(folder)
    check_files(folder, manifest.files)
    wanted = [
        ("weights", "table", (3, 96 * 1024), (0, 0), (3, 96 * 1024)),
        ("weights", "norm", (7,), (2,), (5,)),
        ("weights", "norm", (7,), (0,), (2,)),
        ("first_moment", "cut", (8, 5), (0, 2), (8, 3)),
        ("first_moment", "cut", (8, 5), (0, 0), (8, 2)),
    ]
    types = {"table": torch.float32, "norm": torch.float64, "cut": torch.bfloat16}
    load_boxes(
        folder,
        manifest,
        [LocalBox(kind, name, *rest, torch.empty(size, dtype=types[name]), True) for kind, name, *rest, size in wanted],
    )


def flips(folder: Path, count: int, seed: int) -> Iterator[tuple[str, int]]:
    """Gives (file, bit) for so many bits of each file of a checkpoint, each flipped while it is given.

    Of the file of tensors as many are in the header, and in each box, which are of very different sizes.
    """
    chance = random.Random(seed)
    manifest = read_manifest(folder)
    boxes = [box for tensor in manifest.tensors.values() for box in tensor.boxes]
    ranges = [(0, manifest.files[0].data_begin), *((box.begin, box.begin + box.num_bytes) for box in boxes)]
    for name, places in (("rank_00000.safetensors", ranges), (MANIFEST, [(0, (folder / MANIFEST).stat().st_size)])):
        path = folder / name
        original = path.read_bytes()
        for number in range(count):
            begin, end = places[number % len(places)]
            bit = chance.randrange(8 * begin, 8 * end)
            for byte in (original[bit // 8] ^ 1 << bit % 8, original[bit // 8]):
                with open(path, "r+b") as file:
                    file.seek(bit // 8)
                    file.write(bytes([byte]))
                if byte != original[bit // 8]:
                    yield name, bit
        assert path.read_bytes() == original


@pytest.mark.slow
def test_every_flipped_bit_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / small.name
    shutil.copytree(small, folder)
    for name, bit in flips(folder, 1200, seed=1):
        assert name in refusal(folder), f"bit {bit} of {name}"
        # The loading that a run does refuses it, too.
        with pytest.raises(DamagedError) as caught:
            load_small(folder)
        assert name in str(caught.value), f"bit {bit} of {name}"


@pytest.mark.slow
def test_no_clean_load_is_refused(small: Path) -> None:
    for _ in range(2000):
        load_small(small)
    for _ in range(200):
        list(verify(small))


def test_a_run_refuses_flipped_bits_by_name(clean: tuple[Engine, Path], tmp_path: Path) -> None:
    engine, root = clean
    folder = tmp_path / "iter_0000002"
    shutil.copytree(root / "iter_0000002", folder)
    for name, bit in flips(folder, 20, seed=2):
        assert name in _refusal_of_load(engine, folder), f"bit {bit} of {name}"
    for _ in range(20):
        assert not _refusal_of_load(engine, folder)


def _refusal_of_load(engine: Engine, folder: Path) -> str:
    try:
        load_engine(engine, str(folder))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file, other: file.write_bytes(file.read_bytes()[:-1]),
        lambda file, other: file.write_bytes(file.read_bytes() + b"\0"),
        lambda file, other: file.write_bytes(b""),
        lambda file, other: file.write_bytes(bytes(file.stat().st_size)),
        lambda file, other: shutil.copy(other, file),
        lambda file, other: file.unlink(),
        lambda file, other: (file.unlink(), file.symlink_to(other)),
        lambda file, other: (file.unlink(), os.mkfifo(file)),
        lambda file, other: (file.unlink(), file.mkdir()),
    ],
    ids=["shorter", "longer", "empty", "zeros", "of another step", "missing", "link", "pipe", "folder"],
)
def test_a_foreign_or_broken_file_is_refused_by_name(
    clean: tuple[Engine, Path], tmp_path: Path, spoil: Callable[[Path, Path], object]
) -> None:
    engine, root = clean
    folder = tmp_path / "iter_0000002"
    shutil.copytree(root / "iter_0000002", folder)
    spoil(folder / "rank_00000.safetensors", root / "iter_0000001" / "rank_00000.safetensors")
    assert "rank_00000.safetensors" in refusal(folder)
    assert "rank_00000.safetensors" in _refusal_of_load(engine, folder)


def test_a_file_too_many_is_noticed(clean: tuple[Engine, Path], tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000002"
    shutil.copytree(clean[1] / "iter_0000002", folder)
    (folder / "rank_00001.safetensors").write_bytes(b"")
    assert "rank_00001.safetensors, which does not belong to it" in refusal(folder)


def test_truncation_anywhere_is_refused(clean: tuple[Engine, Path], tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000002"
    shutil.copytree(clean[1] / "iter_0000002", folder)
    chance = random.Random(2)
    for name in (MANIFEST, "rank_00000.safetensors"):
        original = (folder / name).read_bytes()
        for _ in range(60):
            (folder / name).write_bytes(original[: chance.randrange(len(original))])
            assert name in refusal(folder)
        (folder / name).write_bytes(original)


def first_box(manifest: dict[str, Any]) -> list[Any]:
    return next(iter(manifest["tensors"].values()))["boxes"][0]


def put(place: int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        first_box(manifest)[place] = value

    return change


def rename_file(name: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][0][0] = name

    return change


HOSTILE = {
    "path upwards": rename_file("../../secret"),
    "absolute path": rename_file("/etc/passwd"),
    "no name": rename_file(7),
    "file number": put(0, 5),
    "negative file number": put(0, -1),
    "begin before the data": put(1, 0),
    "begin behind the end": put(1, 2**40),
    "fractional begin": put(1, 1.5),
    "true for a number": put(1, True),
    "size": put(2, 2**50),
    "offset outside": put(3, [10**6, 0]),
    "negative offset": put(3, [-1, 0]),
    "huge shape": put(4, [2**61, 2**61]),
    "other dims": put(4, [1]),
    "no checksums": put(5, []),
    "nonsense checksum": put(5, ["x"]),
    "number for a list": put(5, 3),
    "unknown type": lambda manifest: next(iter(manifest["tensors"].values())).update(dtype="O8"),
    "huge tensor": lambda manifest: next(iter(manifest["tensors"].values())).update(shape=[2**40, 2**20]),
    "no dims": lambda manifest: next(iter(manifest["tensors"].values())).update(
        shape=[], boxes=[[0, manifest["files"][0][2], 8, [], [], ["0" * 16]]]
    ),
    "a box twice, another missing": lambda manifest: next(iter(manifest["tensors"].values())).update(
        shape=[2, 1], boxes=[[0, manifest["files"][0][2], 8, [0, 0], [1, 1], ["0" * 16]]] * 2
    ),
    "name of a tensor with a line in it": lambda manifest: manifest["tensors"].update(
        {"weights/a\nb": next(iter(manifest["tensors"].values()))}
    ),
    "fractional sizes": lambda manifest: manifest["files"][0].__setitem__(2, manifest["files"][0][2] + 0.0),
    "of another iteration": lambda manifest: manifest.update(iteration=9),
    "file twice": lambda manifest: manifest["files"].append(manifest["files"][0]),
    "tensors are a list": lambda manifest: manifest.update(tensors=[]),
    "state is a number": lambda manifest: manifest.update(state=1),
    "iteration is text": lambda manifest: manifest.update(iteration="9"),
    "other chunks": lambda manifest: manifest.update(chunk_bytes=1),
    "file of no size": lambda manifest: manifest["files"][0].__setitem__(1, -5),
    "row of files": lambda manifest: manifest.update(files=[[1]]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_refused(
    clean: tuple[Engine, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = tmp_path / "iter_0000002"
    shutil.copytree(clean[1] / "iter_0000002", folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    change(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(text.encode())}))
    assert MANIFEST in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "", "null", "7", '"x"', "\xff", '{"format": NaN}'])
def test_nonsense_for_a_manifest_is_refused(clean: tuple[Engine, Path], tmp_path: Path, text: str) -> None:
    folder = tmp_path / "iter_0000002"
    shutil.copytree(clean[1] / "iter_0000002", folder)
    (folder / MANIFEST).write_text(text, "latin-1")
    assert MANIFEST in refusal(folder)


def test_a_manifest_elsewhere_is_not_followed(clean: tuple[Engine, Path], tmp_path: Path) -> None:
    engine, root = clean
    folder = tmp_path / "iter_0000002"
    shutil.copytree(root / "iter_0000002", folder)
    for replace_by in (
        lambda path: path.symlink_to(root / "iter_0000002" / MANIFEST),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
    ):
        path = folder / MANIFEST
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        replace_by(path)
        assert MANIFEST in refusal(folder)
        assert MANIFEST in _refusal_of_load(engine, folder)


COSTLY = {
    "lists": ("[", "[],", "[]]"),
    "objects": ("[", "{},", "{}]"),
    "entries": ("[", '{"":{}},', "{}]"),
    "short texts": ("[", '"ab",', '""]'),
    "numbers": ("[", "999,", "0]"),
    "names": ("{", lambda number: f'"{number:x}":{{}},', '"z":0}'),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_manifest_takes_no_more_memory_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With everything right but what it says: the longest that is read, and one byte more."""
    monkeypatch.setattr(manifest_module, "_ALWAYS_ALLOWED", 2**18)
    begin, item, end = COSTLY[kind]
    folder = tmp_path / "iter_0000002"
    folder.mkdir()
    with open(folder / "rank_00000.safetensors", "wb") as file:
        file.truncate(2**24)
    head = f'{{"format":"{manifest_module.FORMAT}","chunk_bytes":1,"digest":"","state":{begin}'
    most, tail = manifest_module.most_bytes(2**24), f"{end}}}"
    number, items, length = 0, list[str](), len(head) + len(tail)
    while length < most - 32:
        items.append(item if isinstance(item, str) else item(number))
        length, number = length + len(items[-1]), number + 1
    text = (head + "".join(items) + tail).ljust(most)
    (folder / MANIFEST).write_text(text)
    del items
    tracemalloc.start()
    said = refusal(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "its checksum is another" in said
    assert peak < 2**24, f"{peak / len(text):.1f} bytes for each byte"
    (folder / MANIFEST).write_text(text + " ")
    assert f"has {most + 1} bytes: none of files of {2**24} bytes is that long" in refusal(folder)


def test_a_save_whose_manifest_nobody_would_read_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_ALWAYS_ALLOWED", 100)
    with pytest.raises(ValueError, match=r"cannot be saved: its manifest takes \d+ bytes, and readers allow"):
        save_stream(str(tmp_path), 2, [SMALL[1:2]], [torch.zeros(7, dtype=torch.float64)], {"config": {}})
    assert not list(tmp_path.iterdir())


def test_huge_sizes_take_no_memory(clean: tuple[Engine, Path], tmp_path: Path) -> None:
    """A file of 64 GB that takes no space on the disk, most of it header, and a manifest that says so."""
    folder = tmp_path / "iter_0000002"
    shutil.copytree(clean[1] / "iter_0000002", folder)
    os.truncate(folder / "rank_00000.safetensors", 2**36)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    manifest["files"][0][1:3] = [2**36, 2**36 - 2**30]
    manifest["tensors"] = {
        "weights/huge": {
            "dtype": "F32",
            "shape": [2**28],
            "boxes": [[0, 2**36 - 2**30, 2**30, [0], [2**28], ["0" * 16] * 2**10]],
        }
    }
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(text.encode())}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (file,) = read_manifest(folder).files
    with ShardReader(folder, replace(file, data_begin=2**28)) as reader, pytest.raises(DamagedError, match="header"):
        reader.check_header()
    with open_checkpoint(folder) as checkpoint, pytest.raises(DamagedError, match="is damaged between"):
        values_of(checkpoint, "weights/huge")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_links_among_the_checkpoints_are_removed_and_what_they_point_to_is_not(tmp_path: Path) -> None:
    engine = make_engine(0, Case("", LLAMA | {"checkpoint.save_keep_last": 2}))
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "checkpoints"
    engine.progress.iteration = 1
    kept = save_engine(engine, str(elsewhere)).folder
    root.mkdir()
    (root / kept.name).symlink_to(kept)
    for iteration in (2, 3, 4):
        engine.progress.iteration = iteration
        assert save_engine(engine, str(root)).notes == ()
    assert [folder.name for folder in find_checkpoints(str(root))] == ["iter_0000004", "iter_0000003"]
    assert not list(root.glob("*.tmp"))
    list(verify(kept))


# The format


def test_numpy_and_safetensors_are_enough_to_read_it(tmp_path: Path) -> None:
    """As `docs/checkpoint-format.md` says."""
    engine = make_engine(0, Case("", LLAMA))
    for shard in engine.optimizer.shards:
        shard.state.first_moment.uniform_()
    engine.progress.iteration = 2
    folder = save_engine(engine, str(tmp_path)).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    names = [row[0] for row in manifest["files"]]
    tensors = {}
    for name, tensor in manifest["tensors"].items():
        tensors[name] = np.zeros(tensor["shape"], np.float64)
        for file, begin, num_bytes, offset, shape, chunks in tensor["boxes"]:
            with safe_open(folder / names[file], framework="numpy") as opened:
                values = opened.get_tensor(f"{name}@{','.join(map(str, offset))}")
            place = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
            tensors[name][place] = values
            stored = (folder / names[file]).read_bytes()[begin : begin + num_bytes]
            assert stored == values.tobytes()
            assert chunks == [digest(stored[at : at + CHUNK_BYTES]) for at in range(0, num_bytes, CHUNK_BYTES)]
    assert manifest["iteration"] == 2
    assert manifest["state"]["config"]["model"]["num_layers"] == 4
    total = sum(float(np.sum(values)) for name, values in tensors.items() if name.startswith("first_moment/"))
    # Not the whole shards: between the parameters lies what only fills up.
    boxes = [box for shard in engine.optimizer.shards for box in shard_boxes("", shard, shard.state.first_moment)]
    wanted = sum(float(box.tensor.double().sum()) for box in boxes)
    assert total == pytest.approx(wanted, rel=1e-12)
    assert read_manifest(folder).files[0].num_bytes == (folder / names[0]).stat().st_size
