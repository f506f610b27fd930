"""What a run tells: each step once, one step late, in every place the same."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.config.tree import Config
from megallm.train.metrics import JsonLines, Reporter, log_on_rank_zero, mean_losses
from megallm.train.step import StepMetrics


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = {
        "model.num_layers": 2,
        "model.hidden_size": 16,
        "model.num_attention_heads": 2,
        "model.vocab_size": 32,
        "data.seq_length": 8,
        "training.micro_batch_size": 4,
        "training.train_iters": 5,
        "optimizer.lr": 0.1,
        "logging.log_interval": 2,
        "logging.metrics_jsonl": str(tmp_path / "new" / "metrics.jsonl"),
    }
    return resolve(build(settings), 1)


def metrics(loss: float, *, norm: float = 1.0, skipped: float = 0.0, scale: float = 1.0) -> StepMetrics:
    return StepMetrics(
        torch.tensor([loss], dtype=torch.float64),
        torch.tensor(norm, dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(skipped, dtype=torch.float64),
        torch.tensor(scale, dtype=torch.float64),
        4,
    )


def reporter_of(config: Config, *, world_size: int = 1, report: bool = True) -> Reporter:
    reporter = Reporter(config, world_size, report, ("lm_loss",))
    reporter.start()
    return reporter


def written(config: Config) -> list[dict[str, Any]]:
    assert config.logging.metrics_jsonl is not None
    return [json.loads(line) for line in Path(config.logging.metrics_jsonl).read_text().splitlines()]


def test_a_step_is_published_when_the_next_one_is_under_way(config: Config) -> None:
    reporter = reporter_of(config)
    reporter.step(1, 4, metrics(3.0))
    assert written(config) == []
    reporter.step(2, 8, metrics(2.0))
    assert [line["iteration"] for line in written(config)] == [1]
    reporter.flush()
    reporter.flush()
    assert [(line["iteration"], line["consumed_samples"]) for line in written(config)] == [(1, 4), (2, 8)]


def test_scalars_keep_every_digit(config: Config) -> None:
    reporter = reporter_of(config)
    reporter.step(1, 4, metrics(math.pi, norm=math.e))
    reporter.close()
    (line,) = written(config)
    assert (line["lm_loss"], line["grad_norm"], line["learning_rate"]) == (math.pi, math.e, 0.1)
    assert line["global_batch_size"] == 4
    assert line["skipped"] == 0
    assert list(line)[:3] == ["iteration", "consumed_samples", "lm_loss"]


def test_log_line_means_over_its_steps(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config)
    for number, loss in enumerate((4.0, 2.0, 1.0, 0.5, 0.25), start=1):
        reporter.step(number, 4 * number, metrics(loss))
    reporter.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("lm loss: ")[1].split(" ")[0] for line in lines] == [
        "3.000000E+00",
        "7.500000E-01",
        # The last step has a line of its own.
        "2.500000E-01",
    ]
    assert "iteration        2/       5 |" in lines[0]
    assert "consumed samples:           20 |" in lines[2]


def test_the_loss_scale_is_the_last_one(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config)
    reporter.step(1, 4, metrics(4.0, scale=2.0**32))
    reporter.step(2, 8, metrics(2.0, scale=2.0**31, skipped=1.0, norm=math.inf))
    reporter.close()
    assert " | loss scale: 2147483648.0 | grad norm: inf |" in capsys.readouterr().out
    assert [line["loss_scale"] for line in written(config)] == [2.0**32, 2.0**31]


def test_overflows_at_the_lowest_loss_scale_are_told_once(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    for fp16, told in ((True, 1), (False, 0)):
        reporter = reporter_of(replace(config, training=replace(config.training, fp16=fp16)))
        reporter.step(1, 4, metrics(1.0, scale=2.0, skipped=1.0, norm=math.nan))
        reporter.step(2, 8, metrics(1.0, scale=1.0, norm=1.0))
        for number in (3, 4):
            reporter.step(number, 4 * number, metrics(1.0, scale=1.0, skipped=1.0, norm=math.nan))
        reporter.close()
        output = capsys.readouterr().out
        assert output.count("> iteration 3 was skipped with the loss scale at --min-loss-scale 1:") == told
        assert output.count("was skipped with") == told


def test_skipped_and_undefined_steps_are_counted(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config)
    reporter.step(1, 4, metrics(math.nan, norm=math.nan, skipped=1.0))
    reporter.step(2, 8, metrics(2.0, norm=math.inf, skipped=1.0))
    reporter.step(3, 12, metrics(2.0))
    reporter.step(4, 16, metrics(1.0))
    reporter.close()
    first, second = capsys.readouterr().out.splitlines()
    assert "number of skipped iterations:   2 | number of nan iterations:   1 |" in first
    assert "number of skipped iterations:   0 | number of nan iterations:   0 |" in second
    assert "lm loss: 1.500000E+00 |" in second
    assert [line["lm_loss"] for line in written(config)] == [None, 2.0, 2.0, 1.0], "JSON has no NaN"
    assert [line["skipped"] for line in written(config)] == [1, 1, 0, 0]


def test_time_of_pauses_belongs_to_no_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    reporter = reporter_of(config)
    now[0] += 0.25
    reporter.step(1, 4, metrics(1.0))
    resume = reporter.pause()
    now[0] += 8.0
    resume()
    now[0] += 0.5
    reporter.step(2, 8, metrics(1.0))
    reporter.close()
    assert [line["step_time_ms"] for line in written(config)] == [250.0, 500.0]
    # 4 sequences of 8 tokens
    assert [line["tokens_per_second"] for line in written(config)] == [128.0, 64.0]


def test_validation_stands_in_the_file_and_on_the_screen(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config)
    reporter.evaluation(3, 12, {"lm_loss": 1.25})
    reporter.close()
    assert written(config) == [{"iteration": 3, "consumed_samples": 12, "valid_lm_loss": 1.25}]
    assert "validation loss at iteration 3 | lm_loss value: 1.250000E+00 |" in capsys.readouterr().out


def test_other_ranks_say_and_write_nothing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config, world_size=2, report=False)
    reporter.step(2, 8, metrics(1.0))
    reporter.evaluation(2, 8, {"lm_loss": 1.0})
    reporter.close()
    assert config.logging.metrics_jsonl is not None
    assert not Path(config.logging.metrics_jsonl).exists()
    log_on_rank_zero(1)("a word")
    assert capsys.readouterr().out == ""
    log_on_rank_zero(0)("a word")
    assert capsys.readouterr().out == "> a word\n"


def test_throughput_is_per_process(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config, world_size=4)
    reporter.step(2, 8, metrics(1.0))
    reporter.close()
    (line,) = written(config)
    said = float(capsys.readouterr().out.split("tokens per second per process: ")[1].split(" ")[0])
    assert said == pytest.approx(line["tokens_per_second"] / 4, abs=0.51)


def test_a_file_is_appended_to_and_whole_after_each_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    first = JsonLines(str(path))
    first.write({"a": 1})
    assert path.read_text() == '{"a": 1}\n'
    first.close()
    second = JsonLines(str(path))
    second.write({"a": 2})
    second.close()
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_nothing_is_written_where_nothing_is_asked_for(config: Config, tmp_path: Path) -> None:
    silent = replace(config, logging=replace(config.logging, metrics_jsonl=None))
    reporter = reporter_of(silent)
    reporter.step(1, 4, metrics(1.0))
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_mean_losses_divide_sums_by_counts() -> None:
    assert mean_losses(torch.tensor([6.0, 1.0]), torch.tensor([4.0, 2.0]), ("a", "b")) == {"a": 1.5, "b": 0.5}
