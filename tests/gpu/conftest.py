"""What a GPU that is there for minutes needs: an end in time, and a file of what was found."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from record import machine, write

SLOWEST = 15
START = time.monotonic()
# Tests that did not begin because the time was over.
LEFT_OUT: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=float("inf"), help="after so many no further test begins")
    parser.addoption("--results", type=Path, help="write counts, failures and times of the tests as JSON")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - START > item.config.getoption("--seconds", float("inf")):
        LEFT_OUT.append(item.nodeid)
        pytest.skip("no time was left")


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Half of the tests are not all of them, though none has failed.
    if LEFT_OUT and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if LEFT_OUT:
        seconds = config.getoption("--seconds")
        terminalreporter.write_line(f"{len(LEFT_OUT)} tests did not begin: no time was left of --seconds {seconds:g}")
    # Without the options where these tests are some among all.
    path = config.getoption("--results", None)
    if path is None:
        return
    reports = {what: terminalreporter.stats.get(what, []) for what in ("passed", "failed", "error", "skipped")}
    times = {report.nodeid: round(report.duration, 2) for report in reports["passed"] + reports["failed"]}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    write(
        path,
        {
            "machine": machine("torch"),
            "gpu": gpu,
            "counts": {what: len(found) for what, found in reports.items()},
            "failures": [report.nodeid for report in reports["failed"] + reports["error"]],
            "reasons_of_skips": sorted({report.longrepr[-1] for report in reports["skipped"]}),
            "seconds": round(sum(times.values()), 1),
            "slowest": dict(sorted(times.items(), key=lambda item: -item[1])[:SLOWEST]),
        },
    )
