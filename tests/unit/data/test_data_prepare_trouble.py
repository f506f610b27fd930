"""Preprocessing: every bad input, full disk and second job is a sentence, and leaves nothing half-written."""

import errno
import fcntl
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from prepare_tool import arguments, files_of, run_job, slow_reference
from small_data import TOOLS

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.prepare import pieces
from megallm.data.prepare.encoding import Encoder, EncodeSettings
from megallm.data.prepare.parts import Parts
from megallm.data.prepare.pool import Pool
from megallm.data.prepare.settings import JobSettings
from megallm.data.prepare.worker import WorkerDied
from megallm.data.tokenizer.base import TokenizerSettings
from megallm.data.tokenizer.fast import FastTokenizerDiffers

GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    b"{": ("no_json", "no JSON"),
    b"[1]": ("no_object", "a JSON list stands where an object must"),
    b'{"body": "x"}': ("missing_key", "there is no key 'text'; its keys are 'body'"),
    b'{"text": 3}': ("not_text", "under 'text' stands a JSON number"),
    b'{"text": ["x", null]}': ("not_text", "under 'text' stands a JSON null"),
    b'{"text": "\xff"}': ("no_utf8", r"byte 11 (0xff) is no UTF-8"),
    b'{"text": "\\ud800"}': ("not_text", "half a character, \\ud800"),
    b"[" * 900: ("no_json", "line 43"),
    b'{"text": "' + b"x" * 1000 + b'"}': ("too_large", "the document has 1,012 bytes, the limit is 1,000"),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_document_stops_the_job(tool, tokenizer_json, tmp_path, monkeypatch, workers):
    """Named by file and line, the same for any workers; nothing is left."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    lines = BAD_LINES if workers == 1 else list(BAD_LINES)[:2]
    for line in lines:
        (tmp_path / "in.jsonl").write_bytes(GOOD * 41 + b"\n" + line + b"\n" + GOOD * 20 + b"{\n")
        command = arguments(tokenizer_json, tmp_path / "out" / "x", tmp_path / "in.jsonl")
        code, _, err = tool("preprocess_data", *command, "--workers", workers, "--max-document-bytes", 1000)
        assert code == 2
        assert f"{tmp_path}/in.jsonl, line 43: " in err
        assert BAD_LINES[line][1] in err
        assert err.count("\n") == 1
        assert list((tmp_path / "out").iterdir()) == []


def test_more_workers_than_may_be_started_are_refused_at_once(tool, tokenizer_json, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    command = arguments(tokenizer_json, tmp_path / "out" / "x", tmp_path / "in.jsonl")
    code, _, err = tool("preprocess_data", *command, "--workers", 9999999)
    assert code == 2
    assert "--workers 9999999: 2 files are open for each of the processes" in err and "give at most 2016" in err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_documents_are_skipped_and_counted(tool, tokenizer_json, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    lines = list(BAD_LINES) + [b"{"] * 4
    (tmp_path / "in.jsonl").write_bytes(b"".join(GOOD + line + b"\n" for line in lines))
    command = arguments(tokenizer_json, tmp_path / "out", tmp_path / "in.jsonl")
    flags = ["--on-bad-document", "skip", "--max-document-bytes", 1000, "--workers", workers]
    code, out, err = tool("preprocess_data", *command, *flags)
    assert code == 0
    for number, (_, what) in enumerate(BAD_LINES.values()):
        line = f"in.jsonl, line {2 * number + 2}: "
        assert line in err
        assert what.replace("line 43", "no JSON") in err.split(line)[1].split("\n")[0]
    assert "Skipped: 3 more" in err
    assert "13 bad documents skipped (1 missing_key, 6 no_json, 1 no_object, 1 no_utf8, 3 not_text, 1 too_large)" in out
    assert files_of(tmp_path / "out_text_document") == slow_reference(["good"] * 13, tokenizer_json)


def test_texts_that_the_tokenizer_refuses(tool, tmp_path):
    """Found out of a batch, whatever else is bad in it."""
    lines = [b'{"text": "1 2"}', b'{"text": "one"}', b"{", b'{"text": "3 99"}', b'{"text": "4"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    command = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--workers", 1]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 50]
    code, _, err = tool("preprocess_data", *command, *null)
    assert (code, err.count("\n")) == (2, 1)
    assert "in.jsonl, line 2: NullTokenizer reads whole numbers separated by blanks, not 'one'" in err
    code, out, err = tool("preprocess_data", *command, *null, "--on-bad-document", "skip")
    assert code == 0
    assert "line 4: NullTokenizer has ids 0 to" in err
    assert "3 bad documents skipped (1 no_json, 2 refused_by_tokenizer)" in out
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert [dataset[number].tolist() for number in range(len(dataset))] == [[1, 2], [4]]


def test_ids_outside_the_vocabulary_and_other_ids_of_the_fast_library(tokenizer_json, tmp_path, monkeypatch):
    """The first is a bad document; the second is the fault of the library, and stops the job anyway."""
    (tmp_path / "in.jsonl").write_bytes(GOOD + b'{"text": "bad"}\n' + GOOD)
    tokenizer = TokenizerSettings("HuggingFaceTokenizer", str(tokenizer_json), fast_tokenizer="never")
    encode = EncodeSettings(tokenizer, skip_bad_documents=True)
    encoder = Encoder(encode)
    documents = list(pieces.Input((tmp_path / "in.jsonl",), None, 1000, ("text",)).read(pieces.Position(0, 0, 0), None))

    def encode_flat(texts):
        return np.array([70000 if text == "bad" else 1 for text in texts]), np.ones(len(texts), np.int64)

    monkeypatch.setattr(encoder.tokenizer, "encode_flat", encode_flat)
    encoded = encoder.encode(documents)
    assert encoded.documents == 2
    assert "in.jsonl, line 2: The tokenizer gave id 70000" in encoded.bad[0][1]

    def differs(texts):
        raise FastTokenizerDiffers(1, "other ids")

    monkeypatch.setattr(encoder.tokenizer, "encode_flat", differs)
    with pytest.raises(ValueError, match=r"in.jsonl, line 2: other ids"):
        encoder.encode(documents)


def test_mistakes_on_the_command_line(tool, tokenizer_json, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "hollow.jsonl").write_text('{"text": ""}')
    (tmp_path / "in.csv").write_text("x")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(GOOD * 1000)[:-20])
    command = arguments(tokenizer_json, tmp_path / "out", tmp_path / "empty.jsonl")
    cases = [
        ([*command, "--append-eos"], "there is no argument --append-eos; the nearest is --append-eod"),
        (["--inptu", "x"], "there is no argument --inptu; the nearest is --input"),
        (command[2:], "the following arguments are required: --input"),
        (command[:-4], "the following arguments are required: --tokenizer-type"),
        (command, "There is no document in"),
        ([*command, "--output-prefix", f"{tmp_path}/out/"], f"'{tmp_path}/out/' has no name behind its folder"),
        ([*command, "--output-prefix", ""], "'' has no name behind its folder: add one, my_data for example"),
        ([*command, "--tokenizer-type", "HuggingfaceTokenizer"], "Did you mean HuggingFaceTokenizer?\n"),
        ([*command, "--tokenizer-type", "NullTokenizer", "--vocab-size", 2**31], "is above 2147483647"),
        ([*command, "--workers", "0"], "'0' is not a whole number above 0"),
        ([*command, "--max-document-bytes", 2**31], "the longest that a token file can hold"),
        ([*command, "--json-keys", "a", "a"], "names a key twice"),
        ([*command, "--shard", "2/2"], "there is no shard 2/2"),
        (
            arguments(tokenizer_json, tmp_path / "out", tmp_path / "hollow.jsonl"),
            "hollow.jsonl gives a token under the key 'text'",
        ),
        (arguments(tokenizer_json, tmp_path / "out", tmp_path / "no.jsonl"), "no.jsonl is not there"),
        (arguments(tokenizer_json, tmp_path / "out", tmp_path / "in.csv"), "of an unknown kind; read are .jsonl"),
        (arguments(tokenizer_json, tmp_path / "out", tmp_path / "broken.jsonl.gz"), "broken.jsonl.gz"),
        (arguments(tmp_path / "no.json", tmp_path / "out", tmp_path / "empty.jsonl"), "no.json"),
        (arguments(tokenizer_json, tmp_path / "in.csv" / "x", tmp_path / "empty.jsonl"), "cannot be written"),
    ]
    for words, message in cases:
        code, _, err = tool("preprocess_data", *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    names = ["broken.jsonl.gz", "empty.jsonl", "hollow.jsonl", "in.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.fixture
def job(tokenizer_json, tmp_path):
    """Settings of a job on 2,000 documents, of which 100 make a piece."""
    lines = [json.dumps({"text": f"document number {number}", "title": "x"}).encode() for number in range(2000)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    tokenizer = TokenizerSettings("HuggingFaceTokenizer", str(tokenizer_json), fast_tokenizer="never")

    def make(**settings):
        paths, prefix = (tmp_path / "in.jsonl",), str(tmp_path / "out" / "x")
        return JobSettings(paths, prefix, EncodeSettings(tokenizer, ("text", "title")), **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_DOCUMENTS", 100)
        yield make


@pytest.mark.parametrize("place", ["append", "sync", "write_index"])
def test_a_full_disk(job, tmp_path, monkeypatch, place):
    """Need and free space are said; nothing is left, or with `keep` what a later start goes on from."""
    original, calls = getattr(Parts, place), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) >= (10 if place == "append" else 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    for keep in (False, True):
        calls.clear()
        monkeypatch.setattr(Parts, place, full)
        with pytest.raises(ValueError, match=r"No space left on device. The job had written ") as refused:
            run_job(job(keep=keep), 1)
        need = re.search(r"([\d,]+) bytes and needs about ([\d,]+) for .*; [\d,]+ bytes were free", str(refused.value))
        assert need is not None
        # Of all pieces but the first one, about as long; each document has some 17 tokens of 2 bytes.
        assert int(need[2].replace(",", "")) == pytest.approx(2000 * 2 * 17, rel=0.5)
        assert [path.name for path in (tmp_path / "out").iterdir()] == (["x.preprocessing"] if keep else [])
    monkeypatch.setattr(Parts, place, original)
    assert run_job(job(), 1).totals.documents == 2000
    resumed = files_of(tmp_path / "out" / "x_text_document")
    run_job(job(overwrite=True), 1)
    assert files_of(tmp_path / "out" / "x_text_document") == resumed


def test_a_file_size_limit(tokenizer_json, tmp_path):
    """A real refusal of the system, in a process of its own."""
    (tmp_path / "in.jsonl").write_bytes((b'{"text": "' + b"long " * 2000 + b'"}\n') * 50)
    command = [str(word) for word in arguments(tokenizer_json, tmp_path / "out" / "x", tmp_path / "in.jsonl")]
    done = subprocess.run(
        [sys.executable, TOOLS / "preprocess_data.py", *command, "--workers", "1"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2
    assert "File too large. The job had written" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_two_jobs_on_one_output(job, tmp_path):
    folder = tmp_path / "out" / "x.preprocessing"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another job is writing this output"):
            run_job(job(), 1)
    run_job(job(), 1)
    assert not folder.exists()


class Stop(BaseException):
    """Ends a job as a signal would."""


def stop_after(monkeypatch, count):
    original, calls = Parts.append, []

    def append(*arguments):
        original(*arguments)
        calls.append(arguments)
        if len(calls) == count:
            raise Stop

    monkeypatch.setattr(Parts, "append", append)
    return lambda: monkeypatch.setattr(Parts, "append", original)


def test_an_interrupted_job_of_other_conditions_is_refused(job, tmp_path, monkeypatch):
    """What changed is said, and the work is not touched; --overwrite starts over."""
    go_on = stop_after(monkeypatch, 21)
    with pytest.raises(Stop):
        run_job(job(journal_seconds=0), 1)
    go_on()
    cases = [
        (job(max_document_bytes=1000), "max_document_bytes was .* and is 1000"),
        (JobSettings(**{**vars(job()), "paths": (*job().paths, tmp_path / "in.jsonl")}), "order of input was"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            run_job(settings, 1)
    os.utime(tmp_path / "in.jsonl", (1, 1))
    with pytest.raises(
        ValueError, match=r"interrupted after 1,000 documents, but it was another one: input .*in.jsonl"
    ):
        run_job(job(), 1)
    assert run_job(job(overwrite=True), 1).totals.documents == 2000


def test_damaged_work_is_refused(job, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "x.preprocessing"
    go_on = stop_after(monkeypatch, 21)
    with pytest.raises(Stop):
        run_job(job(journal_seconds=0), 1)
    go_on()
    os.truncate(folder / "1.bin", 10)
    with pytest.raises(ValueError, match=r"1.bin has 10 bytes, but its journal says"):
        run_job(job(keep=True), 1)
    (folder / "journal.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged: --overwrite starts over"):
        run_job(job(), 1)
    assert run_job(job(overwrite=True), 1).totals.documents == 2000


def test_a_worker_that_dies_is_a_sentence(job, tmp_path, monkeypatch):
    """As when the system is out of memory; the job goes on when it is started again."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    encode_all = Pool.encode_all

    def shoot(pool, source):
        for number, result in enumerate(encode_all(pool, source)):
            if number == 5:
                os.kill(pool._workers[0]._process.pid, signal.SIGKILL)
            yield result

    monkeypatch.setattr(Pool, "encode_all", shoot)
    with pytest.raises(WorkerDied, match="most likely for want of memory"):
        run_job(job(journal_seconds=0), 2)
    monkeypatch.setattr(Pool, "encode_all", encode_all)
    assert (tmp_path / "out" / "x.preprocessing").exists()
    assert run_job(job(), 1).totals.documents == 2000


def test_an_input_that_changes_meanwhile(job, tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    original = Parts.append

    def append(*arguments):
        os.truncate(path, path.stat().st_size // 2)
        original(*arguments)

    monkeypatch.setattr(Parts, "append", append)
    with pytest.raises(ValueError, match=r"in.jsonl was changed while it was read"):
        run_job(job(), 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_want_of_memory(job, tmp_path, monkeypatch):
    """What is done is kept."""
    original, calls = Encoder.encode, []

    def encode(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise MemoryError
        return original(*arguments)

    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(WorkerDied, match="not enough memory: use fewer --workers"):
        run_job(job(journal_seconds=0), 1)
    assert (tmp_path / "out" / "x.preprocessing").exists()
    assert run_job(job(), 1).totals.documents == 2000
    assert len(calls) == 5 + 16, "four pieces of twenty were done before"


def test_standard_input_cannot_go_on(tool, tokenizer_json, tmp_path):
    """It is said; after an error nothing is left, and a killed job's rest is taken away by the next."""
    command = [str(word) for word in arguments(tokenizer_json, tmp_path / "out", "-")]
    start = [sys.executable, str(TOOLS / "preprocess_data.py"), *command, "--workers", "1", "--journal-interval", "0"]
    with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(GOOD * 5000)
        process.stdin.flush()
        process.stdout.readline()
        process.kill()
        process.communicate()
    done = subprocess.run(start, input=GOOD * 3, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"cannot go on" in done.stdout
    assert files_of(tmp_path / "out_text_document") == slow_reference(["good"] * 3, tokenizer_json)
    assert not (tmp_path / "out.preprocessing").exists()
    done = subprocess.run([*start, "--overwrite"], input=GOOD + b"{\n", capture_output=True)
    assert done.returncode == 2
    assert b"standard input" in done.stderr
    assert not (tmp_path / "out.preprocessing").exists()
