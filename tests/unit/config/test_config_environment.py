"""What is wrong in the environment is a sentence, and no process waits for others because of it."""

from __future__ import annotations

import pytest

from megallm.config.environment import launcher_problem
from megallm.train import program
from pretrain_gpt import PROGRAM


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "abc", "RANK": "0"}, "WORLD_SIZE is 'abc', no whole number"),
        ({"WORLD_SIZE": "", "RANK": ""}, "RANK is '', no whole number"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT is '-1', no whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is 0, but a job has at least 1 process"),
        ({"WORLD_SIZE": "1", "RANK": "5"}, "RANK is 5, but ranks count from 0 to WORLD_SIZE - 1 = 0"),
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but ranks count from 0 to LOCAL_WORLD_SIZE"),
    ],
)
def test_a_launchers_mistake_is_told(environment: dict[str, str], sentence: str) -> None:
    assert sentence in (launcher_problem(environment) or "")


def test_a_sound_environment_passes() -> None:
    sound = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    assert launcher_problem(sound) is None
    assert launcher_problem({}) is None


def test_a_program_tells_it_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit, match="2"):
        program.main(PROGRAM, ["--dry-run"])
    assert "pretrain_gpt.py: the environment variable WORLD_SIZE is 'two'" in capsys.readouterr().err


def test_a_negative_number_of_processes_is_a_problem_among_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(PROGRAM, ["--dry-run", "--world-size", "-1"])
    assert "--world-size: -1 is out of range; it must be at least 1" in capsys.readouterr().err
