"""The cache of indices: whole or rebuilt, built once by many processes, and clean after any of them is killed."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megallm import file_lock
from megallm.data.samples import index_cache
from megallm.data.samples.index_cache import content_hash, load_or_build
from megallm.data.samples.node_memory import file_signature, once_per_node

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine of this test's own: nothing is known from before."""
    folder = tmp_path / "machine"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def example(size=1000):
    return {
        "document_index": np.arange(size, dtype=np.int32),
        "sample_index": np.arange(2 * size, dtype=np.int64).reshape(size, 2),
        "shuffle_index": np.random.RandomState(1).permutation(size).astype(np.uint32),
    }


def never():
    raise AssertionError("built although it is there")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], strict=True)


def assert_clean(folder, *keys):
    """Nothing but whole entries."""
    assert sorted(path.name for path in folder.iterdir()) == [".building", *sorted(keys)]
    assert list((folder / ".building").iterdir()) == []
    for key in keys:
        assert sorted(path.name for path in (folder / key).iterdir()) == [
            "document_index.npy",
            "entry.json",
            "sample_index.npy",
            "shuffle_index.npy",
        ]


def in_processes(count, function, *arguments):
    """Run a function in forked processes; all must end well."""
    processes = [FORK.Process(target=function, args=(number, *arguments)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


def count_line(path):
    with open(path, "a") as file:
        file.write("once\n")


def lines_of(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


# --- One process


def test_an_entry_is_built_once_and_then_mapped(tmp_path):
    folder = tmp_path / "cache"
    for build in (example, never, never):
        found = load_or_build(folder, "key1", build)
        assert_same(found, example())
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in found.values())
    assert_clean(folder, "key1")


def test_arrays_of_any_shape_come_back(tmp_path):
    arrays = {
        "empty": np.zeros((0, 2), np.int64),
        "scalar": np.array(7, np.int16),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(10, dtype=np.uint32)[::3],
    }
    load_or_build(tmp_path, "key", lambda: arrays)
    assert_same(load_or_build(tmp_path, "key", never), arrays)


def test_an_error_of_the_builder_passes_and_leaves_nothing(tmp_path):
    def fail():
        raise ValueError("too few tokens")

    with pytest.raises(ValueError, match="too few tokens"):
        load_or_build(tmp_path / "cache", "key", fail)
    assert_clean(tmp_path / "cache")
    assert_same(load_or_build(tmp_path / "cache", "key", example), example())


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(data)


def edit_description(entry, change):
    description = json.loads((entry / "entry.json").read_text())
    change(description)
    (entry / "entry.json").write_text(json.dumps(description))


def flip_data_in_secret(entry):
    """One bit of the data changes; size and time of modification are put back."""
    path = entry / "sample_index.npy"
    state = path.stat()
    overwrite(path, -5, b"\x01")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def swap_arrays(entry):
    (entry / "document_index.npy").rename(entry / "aside")
    (entry / "shuffle_index.npy").rename(entry / "document_index.npy")
    (entry / "aside").rename(entry / "shuffle_index.npy")


def replace_by_file(entry):
    shutil.rmtree(entry)
    entry.write_text("no folder")


DAMAGES = {
    "no description": lambda entry: (entry / "entry.json").unlink(),
    "empty description": lambda entry: (entry / "entry.json").write_text(""),
    "description cut off": lambda entry: (entry / "entry.json").write_text((entry / "entry.json").read_text()[:100]),
    "description of another kind": lambda entry: (entry / "entry.json").write_text("[1, 2]"),
    "description not text": lambda entry: (entry / "entry.json").write_bytes(b"\xff\x00\xfe"),
    "older form": lambda entry: edit_description(entry, lambda d: d.update(crc32=d["crc32"] ^ 1)),
    "an array less": lambda entry: edit_description(entry, lambda d: d["arrays"].pop("shuffle_index")),
    "another dtype": lambda entry: edit_description(entry, lambda d: d["arrays"]["sample_index"].update(dtype="<u8")),
    "another shape": lambda entry: edit_description(entry, lambda d: d["arrays"]["sample_index"].update(shape=[2000])),
    "entry of another key": lambda entry: shutil.copytree(entry.with_name("other"), entry, dirs_exist_ok=True),
    "no array": lambda entry: (entry / "sample_index.npy").unlink(),
    "empty array": lambda entry: (entry / "sample_index.npy").write_bytes(b""),
    "array cut off": lambda entry: os.truncate(entry / "sample_index.npy", 5000),
    "array one byte short": lambda entry: os.truncate(
        entry / "sample_index.npy", (entry / "sample_index.npy").stat().st_size - 1
    ),
    "array one byte longer": lambda entry: overwrite(
        entry / "sample_index.npy", (entry / "sample_index.npy").stat().st_size, b"\0"
    ),
    "header": lambda entry: overwrite(entry / "sample_index.npy", 12, b"!"),
    "header of another dtype": lambda entry: np.save(
        entry / "sample_index.npy", np.load(entry / "sample_index.npy").view(np.uint64)
    ),
    "one bit of the data": flip_data_in_secret,
    "last byte": lambda entry: overwrite(entry / "shuffle_index.npy", -1, b"\x77"),
    "arrays swapped": swap_arrays,
    "a folder for an array": lambda entry: (
        (entry / "sample_index.npy").unlink(),
        (entry / "sample_index.npy").mkdir(),
    ),
    "a file for the entry": replace_by_file,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    folder, builds = tmp_path / "cache", []

    def build():
        builds.append(1)
        return example()

    load_or_build(folder, "other", lambda: example(1001))
    load_or_build(folder, "key", build)
    damage(folder / "key")
    assert_same(load_or_build(folder, "key", build), example())
    assert len(builds) == 2
    assert_same(load_or_build(folder, "key", never), example())
    assert_clean(folder, "key", "other")


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path, data):
    load_or_build(tmp_path / "cache", "key", lambda: example(20))
    name = data.draw(st.sampled_from(["entry.json", "document_index.npy", "sample_index.npy", "shuffle_index.npy"]))
    path = tmp_path / "cache" / "key" / name
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert_same(load_or_build(tmp_path / "cache", "key", lambda: example(20)), example(20))
    assert_clean(tmp_path / "cache", "key")


def test_all_bytes_are_read_once_on_a_machine_and_again_after_a_change(tmp_path, monkeypatch):
    load_or_build(tmp_path / "cache", "key", example)
    checks = []
    checksum = index_cache._checksum
    monkeypatch.setattr(index_cache, "_checksum", lambda array: (checks.append(1), checksum(array))[1])
    for _ in range(3):
        load_or_build(tmp_path / "cache", "key", never)
    assert checks == []
    os.utime(tmp_path / "cache" / "key" / "sample_index.npy")
    for _ in range(3):
        load_or_build(tmp_path / "cache", "key", never)
    assert len(checks) == 3
    # On another machine.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(3):
        load_or_build(tmp_path / "cache", "key", never)
    assert len(checks) == 6


# --- Folders that cannot be written


def as_a_user_without_rights(number, folder, key, answer):
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        answer.put(sorted(load_or_build(folder, key, example)))
    except ValueError as error:
        answer.put(str(error))


@pytest.fixture
def open_folder():
    """A folder that every user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("has_leftovers", [False, True])
def test_a_folder_that_cannot_be_written_serves_its_entries(open_folder, machine, has_leftovers):
    folder = open_folder / "cache"
    load_or_build(folder, "key", example)
    if has_leftovers:
        (folder / ".building" / "key.lock").write_text("")
        os.utime(folder / ".building" / "key.lock", (0, 0))
    for path in (folder / ".building", folder):
        path.chmod(0o555)
    answer = FORK.Queue()
    in_processes(1, as_a_user_without_rights, folder, "key", answer)
    assert answer.get(timeout=10) == ["document_index", "sample_index", "shuffle_index"]
    in_processes(1, as_a_user_without_rights, folder, "missing", answer)
    assert answer.get(timeout=10) == (
        f"The indices are not in the cache folder {folder}, and cannot be written there: Permission denied. "
        "Name another folder with --data-cache-path."
    )


def test_a_file_in_the_place_of_the_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Not a directory.*--data-cache-path"):
        load_or_build(tmp_path / "file" / "cache", "key", example)


def test_an_entry_that_this_process_cannot_open_is_not_built_again(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    load_or_build(cache, "key", example)

    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(np, "memmap", fail)
    with pytest.raises(ValueError, match=r"key cannot be opened by this process: Too many open files\."):
        load_or_build(cache, "key", never)
    assert_clean(cache, "key")


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(ValueError, match=r"0\.000 GB are needed and 0\.000 GB are free.*--data-cache-path"):
            load_or_build(tmp_path / "cache", "key", example)
    assert_clean(tmp_path / "cache")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        with pytest.raises(ValueError, match=r"No space left on device.*--data-cache-path"):
            load_or_build(tmp_path / "cache", "key", example)
    assert_clean(tmp_path / "cache")


# --- Many processes


def ask(number, folder, key, counter, seconds):
    def build():
        count_line(counter)
        time.sleep(seconds)
        return example()

    assert_same(load_or_build(folder, key, build), example())


@pytest.mark.parametrize("start", ["nothing", "damaged", "abandoned lock"])
def test_eight_processes_build_once(tmp_path, start):
    folder, counter = tmp_path / "cache", tmp_path / "count"
    if start == "damaged":
        load_or_build(folder, "key", example)
        flip_data_in_secret(folder / "key")
    if start == "abandoned lock":
        (folder / ".building").mkdir(parents=True)
        write_lock(folder / ".building" / "key.lock", process=dead_process())
    in_processes(8, ask, folder, "key", counter, 0.2)
    assert lines_of(counter) == 1
    assert_clean(folder, "key")


def ask_for_one_of_two(number, folder, counters):
    ask(number, folder, f"key{number % 2}", counters[number % 2], 0.2)


def test_two_jobs_build_side_by_side(tmp_path):
    counters = [tmp_path / "count0", tmp_path / "count1"]
    begun = time.monotonic()
    in_processes(6, ask_for_one_of_two, tmp_path / "cache", counters)
    assert [lines_of(counter) for counter in counters] == [1, 1]
    assert time.monotonic() - begun < 30
    assert_clean(tmp_path / "cache", "key0", "key1")


def wait_for_another(number, folder, counter, answer):
    if number == 0:
        ask(number, folder, "key", counter, 1.5)
    else:
        time.sleep(0.1)
        before = time.process_time()
        ask(number, folder, "key", counter, 0)
        answer.put(time.process_time() - before)


@pytest.mark.slow
def test_waiting_costs_no_processor(tmp_path):
    answer = FORK.Queue()
    in_processes(2, wait_for_another, tmp_path / "cache", tmp_path / "count", answer)
    assert lines_of(tmp_path / "count") == 1
    assert answer.get(timeout=10) < 0.3


# --- Killed processes


def ask_slowly(number, folder, key):
    """Builds in small steps, so that a kill finds each stage of the work."""

    def build():
        time.sleep(0.002)
        return example(20_000)

    load_or_build(folder, key, build)


def kill_after(process, seconds):
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("is_reaped", [True, False], ids=["ended", "zombie"])
def test_killed_at_any_moment_the_next_one_finds_or_builds_it_and_cleans_up(tmp_path, is_reaped):
    folder = tmp_path / "cache"
    generator = random.Random(5)
    begun = time.monotonic()
    in_processes(1, ask_slowly, folder, "key")
    whole = time.monotonic() - begun
    stages = {"nothing": 0, "unfinished": 0, "stored": 0}
    for _ in range(30):
        shutil.rmtree(folder, ignore_errors=True)
        victim = FORK.Process(target=ask_slowly, args=(0, folder, "key"))
        victim.start()
        kill_after(victim, generator.uniform(0, 1.1 * whole))
        # A killed process goes on until its call of the system returns.
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        if is_reaped:
            victim.join()
        left = list((folder / ".building").iterdir()) if (folder / ".building").exists() else []
        stages["unfinished" if left else "stored" if (folder / "key").exists() else "nothing"] += 1
        patience = time.monotonic()
        in_processes(1, ask_slowly, folder, "key")
        # A lock whose owner had not yet written its name takes five seconds to be known as abandoned.
        assert time.monotonic() - patience < 15
        assert_same(load_or_build(folder, "key", never), example(20_000))
        assert_clean(folder, "key")
        victim.join()
    assert stages["unfinished"] >= 5, stages


@pytest.mark.slow
def test_some_of_many_killed_the_others_finish(tmp_path):
    generator = random.Random(6)
    for trial in range(15):
        folder = tmp_path / f"cache{trial}"
        processes = [FORK.Process(target=ask_slowly, args=(number, folder, "key")) for number in range(4)]
        for process in processes:
            process.start()
        for victim in processes[:2]:
            kill_after(victim, generator.uniform(0, 0.02))
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes[2:]] == [0, 0]
        assert_same(load_or_build(folder, "key", never), example(20_000))
        # One victim may have died while it took over what the other had left.
        load_or_build(folder, "another", example)
        assert_clean(folder, "another", "key")


def test_what_is_left_of_another_key_is_removed_unless_its_process_lives(tmp_path):
    folder = tmp_path / "cache"
    working = folder / ".building"
    (working / "dead.0123.tmp").mkdir(parents=True)
    (working / "dead.0123.tmp" / "sample_index.npy").write_bytes(b"half")
    (working / "gone.4567.old").mkdir()
    write_lock(working / "dead.lock", process=dead_process())
    (working / "alive.89ab.tmp").mkdir()
    write_lock(working / "alive.lock", process=os.getpid())
    load_or_build(folder, "key", example)
    assert sorted(path.name for path in working.iterdir()) == ["alive.89ab.tmp", "alive.lock"]


def test_a_lock_left_beside_a_whole_entry_is_removed(tmp_path):
    load_or_build(tmp_path / "cache", "key", example)
    working = tmp_path / "cache" / ".building"
    write_lock(working / "key.lock", process=dead_process())
    (working / "key.0123.old").mkdir()
    load_or_build(tmp_path / "cache", "key", never)
    assert_clean(tmp_path / "cache", "key")


# --- Locks


def write_lock(path, process, host=None, start=None, age=0.0):
    owner = {"token": "0123", "host": host or file_lock._host(), "process": process}
    path.write_text(json.dumps({**owner, "start": start or file_lock._start(process)}))
    os.utime(path, (time.time() - age, time.time() - age))


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def is_free(path):
    with file_lock.try_lock(path) as is_held:
        return is_held


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "lock"
    with file_lock.try_lock(path) as is_held:
        assert is_held
        assert not is_free(path)
    assert not path.exists()
    assert is_free(path)


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        ({"process": "self"}, False),
        ({"process": "dead"}, True),
        # The number was given to a later process.
        ({"process": "self", "start": "1"}, True),
        ({"process": "dead", "host": "elsewhere", "age": 60}, False),
        ({"process": "dead", "host": "elsewhere", "age": 130}, True),
        ({"process": "dead", "host": "elsewhere", "age": -1000}, False),
        ("", False),
        ("{", False),
        ({"age": 6}, True),
    ],
    ids=str,
)
def test_a_lock_is_taken_over_when_its_owner_has_ended(tmp_path, lock, expected):
    path = tmp_path / "lock"
    if isinstance(lock, str):
        path.write_text(lock)
    elif "process" not in lock:
        path.write_text("")
        os.utime(path, (time.time() - lock["age"],) * 2)
    else:
        process = os.getpid() if lock["process"] == "self" else dead_process()
        write_lock(path, **{**lock, "process": process})
    assert is_free(path) is expected
    assert [left.name for left in tmp_path.iterdir() if left.name.startswith("lock")] == ([] if expected else ["lock"])


def test_an_owner_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(file_lock, "HEARTBEAT", 0.02)
    with file_lock.try_lock(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_owner_who_lost_its_lock_leaves_the_new_ones_alone(tmp_path):
    path = tmp_path / "lock"
    with file_lock.try_lock(path):
        write_lock(path, process=os.getpid())
    assert path.exists()


def test_an_abandoned_lock_that_another_one_just_took_over_is_left_to_it(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    write_lock(path, process=dead_process())
    is_abandoned = file_lock._is_abandoned

    def slow(path):
        found = is_abandoned(path)
        path.unlink()
        path.write_text(json.dumps({"token": "4567", "host": "elsewhere", "process": 1, "start": "1"}))
        return found

    monkeypatch.setattr(file_lock, "_is_abandoned", slow)
    assert not is_free(path)
    assert json.loads(path.read_text())["token"] == "4567"


def race(number, path, begin, inside, problems):
    begin.wait()
    while True:
        with file_lock.try_lock(path) as is_held:
            if is_held:
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    time.sleep(0.005)
                    os.unlink(inside)
                    return
                count_line(problems)
                return
        time.sleep(0.001)


@pytest.mark.slow
def test_many_that_find_an_abandoned_lock_take_it_over_one_by_one(tmp_path):
    for trial in range(10):
        folder = tmp_path / str(trial)
        folder.mkdir()
        write_lock(folder / "lock", process=dead_process())
        begin = FORK.Event()
        timer = FORK.Process(target=begin.set)
        timer.start()
        in_processes(8, race, folder / "lock", begin, folder / "inside", folder / "problems")
        timer.join()
        assert list(folder.iterdir()) == []


# --- What a machine needs to know once


def find_out(number, counter):
    def compute():
        count_line(counter)
        time.sleep(0.1)
        return "answer"

    assert once_per_node("question", "now", compute) == "answer"


def test_the_processes_of_a_machine_compute_once(tmp_path):
    in_processes(8, find_out, tmp_path / "count")
    assert lines_of(tmp_path / "count") == 1


def test_another_signature_is_another_answer():
    assert once_per_node("question", "now", lambda: "yes") == "yes"
    assert once_per_node("question", "later", lambda: "no") == "no"
    assert once_per_node("question", "later", never) == "no"
    assert once_per_node("another question", "later", lambda: "maybe") == "maybe"


def test_an_error_passes_and_is_not_remembered(machine):
    with pytest.raises(AssertionError, match="built although"):
        once_per_node("question", "now", never)
    assert once_per_node("question", "now", lambda: "yes") == "yes"
    assert not list(machine.rglob("*.lock"))


@pytest.mark.parametrize("hindrance", ["file", "open to all", "missing"])
def test_without_a_folder_of_its_own_each_process_computes(machine, monkeypatch, hindrance):
    folder = machine / f"megallm-{os.getuid()}"
    if hindrance == "file":
        folder.write_text("")
    elif hindrance == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(machine / "no" / "where"))
    assert once_per_node("question", "now", lambda: "yes") == "yes"
    assert once_per_node("question", "now", lambda: "no") == "no"


def test_what_is_remembered_in_a_broken_file_is_computed_again(machine):
    once_per_node("question", "now", lambda: "yes")
    (path,) = (machine / f"megallm-{os.getuid()}").iterdir()
    for content in ("", "[]", '{"signature": "now"}', "\0"):
        path.write_text(content)
        assert once_per_node("question", "now", lambda: "yes") == "yes"


def test_a_signature_notices_what_is_hidden(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    before, state = file_signature(path), path.stat()
    assert file_signature(path) == before
    time.sleep(0.02)
    path.write_text("two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file_signature(path) != before


def test_a_content_hash_is_of_the_bytes_and_computed_once(tmp_path):
    path, other = tmp_path / "a.idx", tmp_path / "b.idx"
    lengths = np.arange(100, dtype=np.int32)
    for file in (path, other):
        file.write_bytes(lengths.tobytes())
    opened = path.stat()
    digest = content_hash(path, opened, "lengths", lengths)
    assert content_hash(other, other.stat(), "lengths", lengths) == digest
    assert content_hash(path, opened, "lengths", lengths + 1) == digest, "the file stands for the array"
    assert content_hash(path, opened, "others", lengths + 1) != digest
    path.write_bytes((lengths + 1).tobytes())
    assert content_hash(path, path.stat(), "lengths", lengths + 1) != digest
    assert content_hash(path, opened, "lengths", lengths) == digest, "another file was opened then"
