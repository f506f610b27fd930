"""Files that shrink, disks that are full, processes that are killed: a sentence, and a dataset is whole or absent."""

import errno
import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megallm.data.indexed import output
from megallm.data.indexed.format import HEADER
from megallm.data.indexed.index import IndexFile
from megallm.data.indexed.merge import merge_datasets
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.writer import IndexedDatasetWriter


def written(prefix, documents, length, first=0):
    with IndexedDatasetWriter(prefix, np.dtype("u2")) as writer:
        tokens = (first + np.arange(documents * length)) % 60000
        writer.add_documents(tokens, np.full(documents, length), np.ones(documents, np.int64))
    return str(prefix)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, mmap):
    prefix = written(tmp_path / "x", 20000, 20)
    dataset = IndexedDataset(prefix, mmap=mmap)
    assert dataset[19999].tolist() == [(number + 399980) % 60000 for number in range(20)]
    os.truncate(f"{prefix}.bin", 4096)
    message = r"x.bin shrank while it was in use: it has 4096 bytes now, and had 800000 when it was opened"
    with pytest.raises(ValueError, match=message):
        dataset.get(19999)
    with pytest.raises(ValueError, match=message):
        dataset.check_ids(60000)


def test_a_mapped_index_that_shrinks(tmp_path):
    dataset = IndexedDataset(written(tmp_path / "x", 20000, 1))
    os.truncate(tmp_path / "x.idx", 4096)
    with pytest.raises(ValueError, match=r"x.idx shrank while it was in use: it has 4096 bytes now, and had 400042"):
        dataset.get(19999)
    plain = tmp_path / "plain"
    plain.mkdir()
    dataset = IndexedDataset(written(plain / "x", 20000, 1), mmap=False)
    os.truncate(plain / "x.idx", 4096)
    assert dataset.get(19999).tolist() == [19999]


@pytest.mark.parametrize("mmap", [True, False])
def test_a_copy_for_a_worker_opens_the_files_again(tmp_path, mmap):
    dataset = IndexedDataset(written(tmp_path / "x", 3, 4), mmap=mmap)
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    copy = pickle.loads(content)
    assert copy[2].tolist() == dataset[2].tolist() == [8, 9, 10, 11]
    assert (copy.mapped is not None) == mmap
    assert copy.file_descriptor != dataset.file_descriptor
    assert not copy[2].flags.writeable


def test_opened_again_without_a_check_of_what_has_not_changed(tmp_path, monkeypatch):
    prefix = written(tmp_path / "x", 3, 4)
    files = IndexedDataset(prefix).checked_files
    monkeypatch.setattr(IndexFile, "check", lambda *_: pytest.fail("checked a second time"))
    assert files.open()[2].tolist() == [8, 9, 10, 11]
    os.utime(f"{prefix}.idx", ns=(0, 0))
    with pytest.raises(ValueError, match=r"x\.idx changed while it was in use: it was written anew"):
        files.open()
    os.truncate(f"{prefix}.bin", 4)
    os.utime(f"{prefix}.idx", ns=(0, files.states[0][1]))
    with pytest.raises(ValueError, match=r"x\.bin changed while it was in use: it had 24 bytes, and has 4 now"):
        files.open()


class SmallDisk(io.FileIO):
    """A file on a disk with room for `room` bytes, shared by all such files."""

    room = 0

    def write(self, content):
        content = memoryview(content).cast("B")
        if SmallDisk.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = min(len(content), SmallDisk.room)
        SmallDisk.room -= count
        return super().write(content[:count])


def small_open(path, mode, buffering):
    return io.BufferedWriter(SmallDisk(path, "x"), buffering)


@pytest.mark.parametrize("buffering", [16, 1 << 20])
def test_a_disk_that_fills_at_any_byte(tmp_path, monkeypatch, buffering):
    monkeypatch.setattr(output, "open", small_open, raising=False)
    monkeypatch.setattr(output, "BUFFER_BYTES", buffering)
    whole = 2 * 3 * 40 + HEADER.size + 12 * 3 + 8 * 4
    for room in range(0, whole, 3):
        SmallDisk.room = room
        with pytest.raises(
            ValueError, match=r"x.bin cannot be written: No space left .* needs [\d,]+ bytes.* are free"
        ):
            written(tmp_path / "x", 3, 40)
        assert list(tmp_path.iterdir()) == []
    SmallDisk.room = whole
    written(tmp_path / "x", 3, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_the_limit_of_the_system_on_files(tmp_path):
    program = (
        "import resource, sys, numpy as np; from megallm.data.indexed.writer import IndexedDatasetWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
        "try:\n"
        "    with IndexedDatasetWriter(sys.argv[1], np.dtype('u2')) as writer:\n"
        "        writer.add_document(np.zeros(60000, np.int64))\n"
        "except ValueError as error:\n"
        "    sys.exit(f'sentence: {error}')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "sentence:" in result.stderr and "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_merging_asks_for_room_first(tmp_path, monkeypatch):
    a = written(tmp_path / "a", 10, 10)
    usage = shutil.disk_usage(tmp_path)._replace(free=300)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    need = 2 * (200 + 12 * 10 + 8 * 10) + HEADER.size + 8
    with pytest.raises(ValueError, match=rf"The dataset needs {need} bytes; 300 bytes are free in .*out"):
        merge_datasets([a, a], str(tmp_path / "out" / "x"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system does not copy by itself")
def test_a_disk_that_fills_while_merging(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    a = written(tmp_path / "a", 10, 10)
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(ValueError, match="No space left on device"):
        merge_datasets([a, a], str(tmp_path / "out" / "x"))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dataset_that_shrinks_while_it_is_merged(tmp_path):
    a, b = written(tmp_path / "a", 10, 1000), written(tmp_path / "b", 10, 1000)

    def progress(count):
        os.truncate(f"{b}.bin", 100)

    with pytest.raises(ValueError, match=r"b.bin shrank|b.bin changed"):
        merge_datasets([a, b], str(tmp_path / "out" / "x"), progress)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("moves", [0, 1])
def test_an_index_never_stands_beside_tokens_of_another(tmp_path, monkeypatch, moves):
    """Where the commit ends before or between its two moves."""
    prefix = written(tmp_path / "x", 3, 4)
    replace, moved = os.replace, []

    def ends(source, target):
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(output.os, "replace", ends)
    with pytest.raises(KeyboardInterrupt):
        written(prefix, 5, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin"]


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_a_whole_dataset_or_none(tmp_path):
    """Two orders of the same datasets are merged to one place in turn, until the process is killed at any moment."""
    a, b = written(tmp_path / "a", 20000, 50), written(tmp_path / "b", 20000, 30, first=7)
    expected = []
    for number, order in enumerate(([a, b], [b, a])):
        merge_datasets(order, str(tmp_path / f"expected{number}"))
        expected.append(tuple((tmp_path / f"expected{number}{end}").read_bytes() for end in (".bin", ".idx")))
    program = (
        "import itertools, sys; from megallm.data.indexed.merge import merge_datasets\n"
        "a, b, out = sys.argv[1:]\n"
        "print('ready', flush=True)\n"
        "for order in itertools.cycle(([a, b], [b, a])): merge_datasets(order, out)\n"
    )
    generator = random.Random(5)
    outcomes = set()
    for _ in range(12):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        command = [sys.executable, "-c", program, a, b, str(tmp_path / "out" / "x")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(generator.uniform(0, 0.08))
            process.send_signal(signal.SIGKILL)
        if not (tmp_path / "out" / "x.idx").exists():
            with pytest.raises(ValueError, match=r"x.idx does not exist"):
                IndexedDataset(tmp_path / "out" / "x")
            outcomes.add("absent")
            continue
        assert tuple((tmp_path / "out" / f"x{end}").read_bytes() for end in (".bin", ".idx")) in expected
        outcomes.add("whole")
    assert outcomes == {"absent", "whole"}
