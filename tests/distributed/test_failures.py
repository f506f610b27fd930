"""A process that dies, fails or hangs ends the job soon, and who reads the last lines knows which one and why."""

from __future__ import annotations

import re
import socket
import sys
import time

import pytest

from megallm.communication import Group, Transport
from megallm.journal import CommunicationError, Journal
from megallm.train.watch import hang_report
from tests.distributed.launch import TINY, Ended, run, torchrun, without

FLAGS = without(TINY, "--eval-interval", "--eval-iters")
HOST = re.escape(socket.gethostname())


def broken(how: str, *flags: str) -> Ended:
    return torchrun(2, "-m", "tests.distributed.broken_program", how, *FLAGS, *flags)


def test_operations_are_counted_by_group_and_named_with_their_place() -> None:
    journal = Journal()
    transport = Transport(None, name="tp (ranks 0 1)", journal=journal)
    transport.start(lambda late: None, asynchronous=False, name="barrier")
    Transport(None, name="dp (ranks 0 2)", journal=journal).start(lambda late: None, False, "barrier")

    def lost(late: bool) -> None:
        (operation,) = journal.waiting()
        assert operation.number == 2
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nand much more")

    group = Group((0, 1), 0, transport)
    with pytest.raises(CommunicationError) as caught:
        group._transport.start(lost, asynchronous=False, name="all_reduce")
    assert re.fullmatch(
        r"all_reduce, number 2 of group tp \(ranks 0 1\), called at distributed/test_failures.py:\d+ in "
        r"test_operations_are_counted_by_group_and_named_with_their_place, from .* failed: Connection closed by peer "
        r"\[127.0.0.1\]:1",
        str(caught.value),
    )
    assert journal.waiting() == []
    report = hang_report(journal, 600.0)
    assert report.startswith("no progress for 10 minutes, the limit of --distributed-timeout-minutes\n")
    assert "  waits in no message: the others wait for this process\n" in report
    assert "  last of its group: all_reduce, number 2 of group tp (ranks 0 1), called at" in report
    assert "  last of its group: barrier, number 1 of group dp (ranks 0 2), called at" in report
    assert re.search(r"  main thread: train/watch.py:\d+|  main thread: megallm/journal.py:\d+", report)


@pytest.mark.slow
def test_the_launcher_names_a_process_that_died_and_the_others_what_they_waited_for() -> None:
    begin = time.monotonic()
    ended = broken("die", "--train-iters", "100000", "--pipeline-model-parallel-size", "2")
    assert time.monotonic() - begin < 60
    assert ended.code == 1
    assert re.search(
        rf"^rank 0 on {HOST}: (receive from|send to) rank 1, number \d+ of group pipeline, called at megallm/pipeline/"
        r"executor.py:\d+ in \S+, from .* failed: ",
        ended.errors,
        re.MULTILINE,
    )
    last = ended.errors[ended.errors.index("Root Cause") :]
    assert re.search(r"host +: \S+\n +rank +: 1 \(local_rank: 1\)\n +exitcode +: -9", last)


@pytest.mark.slow
def test_the_launcher_shows_the_traceback_of_a_defect() -> None:
    ended = broken("fail", "--tensor-model-parallel-size", "2")
    last = ended.errors[ended.errors.index("Root Cause") :]
    assert re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: 1 ", last)
    assert "RuntimeError: a defect of ours" in last
    assert re.search(r"error_file: /.*/error.json", last)


@pytest.mark.slow
def test_a_hang_ends_in_time_and_every_rank_says_where_it_is() -> None:
    begin = time.monotonic()
    ended = broken("spin", "--distributed-timeout-minutes", "0.1")
    assert time.monotonic() - begin < 60
    assert ended.code == 1
    reports = dict(re.findall(rf"^rank (\d) on {HOST}: (no progress for 0.1 minutes.*(?:\n  .*)+)", ended.errors, re.M))
    assert set(reports) == {"0", "1"}
    assert re.search(
        r"  waits for \d+ s in all_reduce, number \d+ of group cp\+dp \(ranks 0 1\), called at megallm/train/loss.py:",
        reports["0"],
    )
    assert "  waits in no message: the others wait for this process\n" in reports["1"]
    assert re.search(r"  main thread: .*broken_program.py:\d+ in spin\n", reports["1"])
    assert re.search(
        r"  last of its group: all_reduce, number \d+ of group tp\+cp\+dp\+pp|of group cp\+dp", reports["1"]
    )


@pytest.mark.slow
def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        names = f"RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}".split()
        ended = run(["env", *names, sys.executable, "pretrain_gpt.py", *FLAGS, "--global-batch-size", "4"])
    assert ended.code == 2
    assert f"pretrain_gpt.py: MASTER_PORT {port} is used by another program on this machine" in ended.errors
    assert "Traceback" not in ended.errors
