"""Published launch scripts for Megatron run as they stand: every flag is taken or answered, and the plan is printed."""

from __future__ import annotations

import json

import pytest

import pretrain_bert
import pretrain_gpt
from tests.unit.config.megatron_scripts import SCRIPTS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.endswith(("345M", "7B")) else pytest.mark.slow) for name in SCRIPTS]
)
def test_published_scripts_parse_and_are_planned(capsys: pytest.CaptureFixture[str], name: str) -> None:
    gpus, line, billions = SCRIPTS[name]
    program = pretrain_bert if name.startswith("bert") else pretrain_gpt
    program.main([*line.split(), "--dry-run", "--json", "--world-size", str(gpus)])
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] / 1e9 == pytest.approx(billions, rel=0.005)
    assert told["world_size"] == gpus
    assert told["memory_peak_bytes"] > 0
    assert sum(stage["layers"] for stage in told["stages"]) == int(line.split("--num-layers ")[1].split()[0])
