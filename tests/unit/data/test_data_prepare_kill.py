"""Preprocessing killed at any moment: no process stays, and started again it gives the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from prepare_tool import arguments, files_of, run_job, slow_reference
from small_data import TEXTS, TOOLS

from megallm.data.prepare.encoding import EncodeSettings
from megallm.data.prepare.settings import JobSettings
from megallm.data.tokenizer.base import TokenizerSettings

# The tool with small pieces, so that there are many moments.
DRIVER = """
import runpy, sys
from megallm.data.prepare import pieces
pieces.PIECE_BYTES = 20_000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NUMBER_OF_DOCUMENTS = 12_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer_json):
    """A file of 2 MB, and the bytes that it must become."""
    path = tmp_path_factory.mktemp("corpus") / "in.jsonl"
    texts = [f"{number} {TEXTS[number % 4]}" for number in range(NUMBER_OF_DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, slow_reference(texts, tokenizer_json)


def start(corpus, tokenizer_json, folder, workers):
    words = [*arguments(tokenizer_json, folder / "out", corpus), "--workers", workers, "--journal-interval", 0]
    command = [sys.executable, "-c", DRIVER, TOOLS / "preprocess_data.py", *words, "--log-interval", 100]
    return subprocess.Popen(
        [str(word) for word in command],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TOOLS.parent)},
    )


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids, seconds=5.0):
    limit = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < limit, "a process stayed"
        time.sleep(0.02)


def wait_for_work(process):
    """Return at the first line about progress."""
    for line in process.stderr:
        if line.startswith(("Processed", "Going on")):
            return


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(corpus, tokenizer_json, tmp_path, workers):
    """The whole group or the first process alone, six times at least; the last start runs to its end."""
    path, expected = corpus
    generator = random.Random(workers)
    kills = done = 0
    while kills < 6 or not done:
        with start(path, tokenizer_json, tmp_path, workers) as process:
            if kills >= 6:
                _, err = process.communicate()
                assert process.returncode == 0, err
                done = True
                break
            with suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0.2, 1.1))
            if process.poll() is not None:
                # Whole before its time: the next start has to make it anew.
                assert process.returncode == 0, process.stderr.read()
                assert files_of(tmp_path / "out_text_document") == expected
                for file in tmp_path.iterdir():
                    file.unlink()
                continue
            everyone = [process.pid, *children(process.pid)]
            if generator.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.communicate()
            wait_for_end(everyone)
            kills += 1
    assert files_of(tmp_path / "out_text_document") == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"out_text_document{ending}" for ending in (".bin", ".idx", ".tokenizer.json")
    ]


@pytest.mark.slow
def test_killed_workers_die_with_their_parent_in_a_long_document(tokenizer_json, tmp_path):
    (tmp_path / "in.jsonl").write_text((json.dumps({"text": TEXTS[0] * 100_000}) + "\n") * 2)
    with start(tmp_path / "in.jsonl", tokenizer_json, tmp_path, 2) as process:
        process.stdout.readline()
        time.sleep(1.5)
        workers = children(process.pid)
        assert len(workers) == 2
        process.kill()
        process.communicate()
    wait_for_end(workers, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
)
def test_asked_to_end(corpus, tokenizer_json, tmp_path, number, to_group):
    """Workers end, too; a sentence says how to go on, and it goes on."""
    path, expected = corpus
    with start(path, tokenizer_json, tmp_path, 2) as process:
        wait_for_work(process)
        everyone = [process.pid, *children(process.pid)]
        assert len(everyone) == 3
        (os.killpg if to_group else os.kill)(process.pid, number)
        _, err = process.communicate()
    assert process.returncode == 128 + number
    assert f"ended by {signal.Signals(number).name} after" in err
    assert "the same command goes on there" in err
    assert "Traceback" not in err
    wait_for_end(everyone)
    with start(path, tokenizer_json, tmp_path, 1) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert "Going on after" in err
    assert files_of(tmp_path / "out_text_document") == expected


def killed_at(moment, settings):
    """Run the job in a process that is killed at its `moment`-th change of names; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def deadly(function):
            def call(*words, **options):
                nonlocal count
                for here in (count + 1, count + 2):
                    if here == count + 2:
                        function(*words, **options)
                    if here == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                count += 2

            return call

        os.replace, os.unlink, os.rmdir = deadly(os.replace), deadly(os.unlink), deadly(os.rmdir)
        try:
            run_job(settings, 1)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
def test_killed_before_and_after_each_rename_and_removal(tmp_path):
    """Of a job that replaces an output of two keys: started again, the new output is there and nothing else."""
    (tmp_path / "in.jsonl").write_text('{"a": "1 2", "b": "3"}\n{"a": "4", "b": "5 6"}\n')
    encode = EncodeSettings(TokenizerSettings("NullTokenizer", vocab_size=100), ("a", "b"))
    inputs = (tmp_path / "in.jsonl",)
    run_job(JobSettings(inputs, str(tmp_path / "fresh" / "x"), encode), 1)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()}
    old = EncodeSettings(TokenizerSettings("NullTokenizer", vocab_size=100), ("b", "a"), append_eod=True)
    moment = 0
    while True:
        moment += 1
        prefix = tmp_path / str(moment) / "x"
        run_job(JobSettings(inputs, str(prefix), old), 1)
        came_so_far = killed_at(moment, JobSettings(inputs, str(prefix), encode, overwrite=True))
        run_job(JobSettings(inputs, str(prefix), encode, overwrite=True), 1)
        there = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
        assert there == expected, f"killed at {moment}"
        if not came_so_far:
            break
    assert moment > 30
