"""tools/schedule.py: each command, its files, and mistakes answered in a sentence."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.schedule import Costs, Schedule, Timeline, build_schedule, lower, simulate

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "schedule.py"


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("schedule_tool", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, capsys):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def run_tool(*arguments):
        code = tool.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run_tool


def in_another_process(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_help_is_quick_and_needs_no_torch():
    """CPU time, so that a busy machine does not matter. Python's own start is part of it."""
    code = (
        "import runpy, sys, time\n"
        "del sys.argv[0]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy imports'\n"
        "print('CPU', time.process_time())\n"
    )
    process = in_another_process(code, str(TOOL), "--help")
    assert process.returncode == 0, process.stderr
    text, seconds = process.stdout.rsplit("CPU", 1)
    assert float(seconds) < 0.5
    for command in ("print", "verify", "simulate", "compare", "draw"):
        assert f"schedule.py {command}" in text or f"    {command} " in text


def test_package_imports_without_torch():
    process = in_another_process("import megallm.schedule, sys; sys.exit('torch' in sys.modules)")
    assert process.returncode == 0, process.stderr


def test_a_reader_that_stops_early_is_no_error():
    process = subprocess.run(
        f"{sys.executable} {TOOL} print -p 8 -v 4 -m 256 --lowered | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert process.stdout == "interleave"
    assert process.stderr == ""


def test_print(run):
    code, output, _ = run("print", "-p", 2, "-m", 2)
    assert code == 0
    assert output.splitlines() == [
        "1f1b: 2 ranks, 2 stages, 2 micro-batches",
        "rank 0: 0F0 0F1 0B0 0B1",
        "rank 1: 1F0 1B0 1F1 1B1",
    ]


def test_print_lowered(run):
    _, output, _ = run("print", "-p", 2, "-m", 1, "--lowered")
    assert output.splitlines()[1] == "rank 0: 0F0 0SEND_F0 0RECV_B0[0] 0B0[0] 0REDUCE_GRAD"


def test_virtual_stages_choose_interleaved(run):
    assert run("print", "-p", 2, "-v", 2)[1].startswith("interleaved: 2 ranks, 4 stages, 8 micro-batches")


def test_csv_out_and_in(run, tmp_path):
    path = tmp_path / "mine.csv"
    code, _, _ = run("print", "-p", 3, "-v", 2, "-m", 5, "--to-csv", path)
    assert code == 0
    assert Schedule.from_csv(path.read_text()).actions == build_schedule("interleaved", 3, 2, 5).actions
    code, output, _ = run("verify", "--from-csv", path)
    assert code == 0
    assert output.startswith("mine: 3 ranks, 6 stages, 5 micro-batches: correct, and free of deadlock")
    assert run("print", "-p", 3, "-v", 2, "-m", 5, "--to-csv", "-")[1] == path.read_text()


def test_verify_reports_what_it_proved(run):
    lowered = lower(build_schedule("interleaved", 4, 2, 8))
    code, output, _ = run("verify", "-p", 4, "-v", 2, "-m", 8)
    assert code == 0
    assert "in flight, per rank    11 9 7 5" in output
    assert f"fingerprint            {lowered.fingerprint()}" in output


def test_simulate(run):
    code, output, _ = run("simulate", "-p", 4, "-m", 8, "--message-cost", 0.1)
    assert code == 0
    assert "makespan 34.7, bubble 30.8%" in output
    assert len(output.splitlines()) == 3 + 4


def test_simulate_with_costs_per_stage(run):
    _, output, _ = run("simulate", "-p", 2, "-m", 1, "--forward-cost", 1, 3, "--backward-cost", 2)
    assert "makespan 8," in output


def test_compare(run):
    code, output, _ = run("compare", "-p", 4, "-m", 8, 16, "-v", 1, 2)
    rows = [line.split() for line in output.splitlines()[3:]]
    assert code == 0
    assert ["interleaved", "2", "8", "28.5", "15.8%", "5.5", "11", "112"] in rows
    assert [row[:3] for row in rows if row[2] == "16"] == [
        ["gpipe", "1", "16"],
        ["gpipe", "2", "16"],
        ["1f1b", "1", "16"],
        ["interleaved", "2", "16"],
    ]


def test_draw_in_the_terminal(run):
    code, output, _ = run("draw", "-p", 2, "-m", 2)
    assert code == 0
    assert output.splitlines()[0] == "rank 0 F0-F1-      B0====   B1===="


def test_draw_files(run, tmp_path):
    picture, trace, lines = tmp_path / "a.svg", tmp_path / "a.json", tmp_path / "a.jsonl"
    arguments = ("--svg", picture, "--chrome-trace", trace, "--timeline", lines)
    assert run("draw", "-p", 2, "-v", 2, "-m", 2, *arguments) == (0, "", "")
    assert picture.read_text().startswith("<svg")
    assert len(json.loads(trace.read_text())["traceEvents"]) > 16
    planned = simulate(lower(build_schedule("interleaved", 2, 2, 2)))
    assert Timeline.from_json(lines.read_text()).events == planned.events


def test_draw_a_measurement_beside_the_plan(run, tmp_path):
    """Files of single ranks are joined, and the plan takes the measured means."""
    lowered = lower(build_schedule("1f1b", 2, 1, 3))
    measured = simulate(lowered, Costs(forward=0.25, backward=[0.5, 0.75], message=0.125))
    files = []
    for rank in range(2):
        part = Timeline("part", tuple(event for event in measured.events if event.rank == rank))
        files.append(tmp_path / f"timeline.{rank}.jsonl")
        files[-1].write_text(part.to_json())
    code, output, _ = run("draw", "-p", 2, "-m", 3, "--measured", *files)
    lines = output.splitlines()
    planned = simulate(lowered, Costs(forward=0.25, backward=[0.5, 0.75]))
    assert code == 0
    assert lines[2].startswith(f"1f1b, planned: makespan {planned.makespan:.4g} s,")
    assert lines[5].startswith(f"measured: makespan {measured.makespan:.4g} s,")
    assert run("draw", "-p", 2, "-m", 3, "--measured", *files, "--svg", tmp_path / "both.svg")[0] == 0
    assert "planned" in (tmp_path / "both.svg").read_text()


def test_mistakes_are_answered_in_a_sentence(run, tmp_path):
    broken, deadlock, timeline = tmp_path / "broken.csv", tmp_path / "deadlock.csv", tmp_path / "timeline.jsonl"
    broken.write_text("0F0,what\n")
    deadlock.write_text("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n")
    timeline.write_text("what\n")
    for arguments, sentence in [
        (("print", "--schedule", "1f1b", "-v", 2), "use interleaved for virtual stages"),
        (("print", "-p", 0), "num_ranks is 0; it must be at least 1"),
        (("verify", "--from-csv", broken), "row 1: 'what' is not an action"),
        (("verify", "--from-csv", deadlock), "inputs never arrive for rank 0 at 0B0, rank 1 at 1F1"),
        (("verify", "--from-csv", tmp_path / "none.csv"), "No such file"),
        (("verify", "--from-csv", broken, "-p", 2, "--forward-only"), "leave out --num-ranks, --forward-only"),
        (("verify", "-p", 4, "--max-in-flight", 2), "3 activations are in flight, 2 are allowed"),
        (("simulate", "--forward-cost", 1, 2, 3), "3 forward costs are given for 4 stages"),
        (("simulate", "--message-cost", -1), "not negative"),
        (("compare", "-p", 4, "-m", 0), "num_micro_batches is 0"),
        (("draw", "--measured", timeline), "line 1 is not an event"),
        (("draw", "--svg", tmp_path / "no" / "where.svg"), "No such file"),
    ]:
        code, _, errors = run(*arguments)
        assert code == 2, arguments
        assert sentence in errors, arguments
        assert len(errors.splitlines()) == 1
        assert "Traceback" not in errors


def test_unknown_options_exit_with_two(tool):
    with pytest.raises(SystemExit) as stop:
        tool.main(["print", "--what"])
    assert stop.value.code == 2


def test_files_that_cannot_be_used_are_named(run, tmp_path):
    binary, missing = tmp_path / "binary", tmp_path / "missing" / "file"
    binary.write_bytes(b"\xdf\x00")
    for arguments in (("print", "--from-csv"), ("draw", "--measured")):
        code, _, errors = run(*arguments, binary)
        assert code == 2 and f"{binary} cannot be read: it is no text in UTF-8" in errors
    for arguments in (("print", "--from-csv"), ("draw", "--measured"), ("draw", "--svg")):
        code, _, errors = run(*arguments, missing)
        assert code == 2 and f"{missing} cannot be read or written: No such file or directory" in errors
