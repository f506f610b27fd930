"""What a run tells: each step once, one step late, in every place the same."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.config.tree import Config
from megallm.train.metrics import Reporter, log_on_rank_zero, mean_losses
from megallm.train.outputs import try_outputs
from megallm.train.step import StepMetrics
from megallm.train.timing import format_times
from megallm.train.writers import JsonLines


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


def changed(config: Config, **logging: Any) -> Config:
    return replace(config, logging=replace(config.logging, **logging))


def test_what_only_some_ask_for_stands_where_megatron_has_it(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = reporter_of(changed(config, log_memory_to_tensorboard=True, log_validation_ppl_to_tensorboard=True))
    step = metrics(3.0)
    step.more = {
        "params_norm": torch.tensor(2.5, dtype=torch.float64),
        "num_zeros": torch.tensor(17.0, dtype=torch.float64),
        "decoupled_learning_rate": torch.tensor(0.25, dtype=torch.float64),
    }
    reporter.step(2, 8, step)
    reporter.flush()
    reporter.evaluation(2, 8, {"lm_loss": 0.5})
    reporter.close()
    line, evaluation = written(config)
    assert (line["num_zeros"], line["params_norm"], line["decoupled_learning_rate"]) == (17.0, 2.5, 0.25)
    assert line["mem-max-resident-bytes"] > 2**20
    assert evaluation["valid_lm_loss_ppl"] == math.exp(0.5)
    output = capsys.readouterr().out
    assert " learning rate: 1.000000E-01 | decoupled learning rate: 2.500000E-01 | global batch size:" in output
    assert " | grad norm: 1.000 | num zeros: 17 | params norm: 2.500 | number of skipped iterations:" in output


def test_tensorboard_gets_each_scalar_at_its_interval(config: Config, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = str(tmp_path / "board")
    reporter = reporter_of(changed(config, tensorboard_dir=folder, tensorboard_log_interval=2))
    for number in range(1, 6):
        reporter.step(number, 4 * number, metrics(1.0 / number))
    reporter.close()
    events = EventAccumulator(folder).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm_loss")] == [(2, 0.5), (4, 0.25)]
    assert "learning_rate" in events.Tags()["scalars"]


def test_weights_and_biases_gets_everything_and_is_asked_for_where_it_is_missing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = changed(
        config, wandb_project="p", wandb_exp_name="n", wandb_entity="e", wandb_save_dir=str(tmp_path / "w")
    )
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        reporter_of(wanted)
    reporter_of(wanted, report=False).close()
    # All ranks are told before the first step; only one of them would find out later.
    with pytest.raises(ValueError, match="pip install wandb"):
        try_outputs(wanted)

    class Run:
        logged: ClassVar[list[tuple[dict[str, Any], int]]] = []
        finished = False

        def log(self, scalars: dict[str, Any], step: int) -> None:
            self.logged.append((scalars, step))

        def finish(self) -> None:
            Run.finished = True

    started: dict[str, Any] = {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: started.update(settings) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    reporter = reporter_of(wanted)
    reporter.step(1, 4, metrics(3.0))
    reporter.flush()
    reporter.evaluation(1, 4, {"lm_loss": 2.0})
    reporter.close()
    assert (started["project"], started["name"], started["entity"]) == ("p", "n", "e")
    assert started["dir"] == str(tmp_path / "w")
    assert (tmp_path / "w").is_dir()
    assert started["config"]["model"]["num_layers"] == 2
    assert [(step, scalars.get("lm_loss"), scalars.get("valid_lm_loss")) for scalars, step in Run.logged] == [
        (1, 3.0, None),
        (1, None, 2.0),
    ]
    assert Run.finished


def test_times_of_all_ranks_in_megatrons_form() -> None:
    times = {"forward-backward": [0.25, 0.5], "optimizer": [0.002, 0.001]}
    assert format_times(times, "minmax").splitlines() == [
        "(min, max) time across ranks (ms):",
        "    forward-backward...................: (250.00, 500.00)",
        "    optimizer..........................: (1.00, 2.00)",
    ]
    assert format_times(times, "max").splitlines()[:2] == [
        "max time across ranks (ms):",
        "    forward-backward...................: 500.00",
    ]
    assert format_times(times, "all").splitlines()[:4] == [
        "times across ranks (ms):",
        "    forward-backward:",
        "       rank  0: 250.00",
        "       rank  1: 500.00",
    ]


def test_validation_stands_in_the_file_and_on_the_screen(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config)
    reporter.evaluation(3, 12, {"lm_loss": 1.25})
    reporter.close()
    assert written(config) == [{"iteration": 3, "consumed_samples": 12, "valid_lm_loss": 1.25}]
    # exp(1.25)
    said = " validation loss at iteration 3 | lm loss value: 1.250000E+00 | lm loss PPL: 3.490343E+00 |\n"
    assert capsys.readouterr().out == said


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
    first.write(1, {"a": 1})
    assert path.read_text() == '{"iteration": 1, "a": 1}\n'
    first.close()
    second = JsonLines(str(path))
    second.write(2, {"a": 2})
    second.close()
    assert path.read_text() == '{"iteration": 1, "a": 1}\n{"iteration": 2, "a": 2}\n'
    # A line that a full disk or a power cut has torn is not continued.
    whole, long = '{"iteration": 1}', f'{{"text": "{"x" * 2**20}'
    for found, kept in (
        (whole + '\n{"ite', whole + "\n"),
        ('{"ite', ""),
        # One that lacks its newline alone is ended.
        (whole, whole + "\n"),
        (whole + "\n" + whole, whole + "\n" + whole + "\n"),
        # Nothing is cut in its middle.
        (whole + "\n" + long, whole + "\n" + long + "\n"),
    ):
        path.write_text(found)
        third = JsonLines(str(path))
        third.write(3, {"a": 3})
        third.close()
        assert path.read_text() == kept + '{"iteration": 3, "a": 3}\n'


def test_a_full_disk_costs_the_file_and_not_the_run(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    full = replace(config, logging=replace(config.logging, metrics_jsonl="/dev/full", log_interval=1))
    reporter = reporter_of(full)
    for iteration in (1, 2, 3):
        reporter.step(iteration, 4, metrics(1.0))
    reporter.close()
    said = capsys.readouterr().out
    assert said.count("> --metrics-jsonl /dev/full cannot be written to: No space left on device; the run goes on") == 1
    assert said.count("] iteration ") == 3


def test_a_metrics_file_that_cannot_be_written_is_refused_before_the_first_step(config: Config, tmp_path: Path) -> None:
    try_outputs(config)
    assert written(config) == []
    # An existing file that may not be written, which holds for any user: a link to itself.
    itself = tmp_path / "itself"
    itself.symlink_to(itself)
    with pytest.raises(ValueError, match=r"--metrics-jsonl .*itself cannot be written to: Too many levels"):
        try_outputs(changed(config, metrics_jsonl=str(itself)))
    with pytest.raises(ValueError, match=r"--metrics-jsonl .* is a folder; name a file in it"):
        try_outputs(changed(config, metrics_jsonl=str(tmp_path)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_tensorboard_and_not_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = str(tmp_path / "board")
    reporter = reporter_of(changed(config, tensorboard_dir=folder, tensorboard_log_interval=1, log_interval=1))
    reporter.step(1, 4, metrics(1.0))
    # TensorBoard writes in a thread of its own, whose error the next call raises.
    monkeypatch.setattr(RecordWriter, "write", fail)
    monkeypatch.setattr(RecordWriter, "flush", fail)
    for iteration in (2, 3, 4):
        reporter.step(iteration, 4, metrics(1.0))
    reporter.close()
    said = capsys.readouterr().out
    assert (
        said.count(f"> --tensorboard-dir {folder} cannot be written to: No space left on device; the run goes on") == 1
    )
    assert said.count("] iteration ") == 4
    assert len(written(config)) == 4


def test_nothing_is_written_where_nothing_is_asked_for(config: Config, tmp_path: Path) -> None:
    silent = replace(config, logging=replace(config.logging, metrics_jsonl=None))
    reporter = reporter_of(silent)
    reporter.step(1, 4, metrics(1.0))
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_mean_losses_divide_sums_by_counts() -> None:
    assert mean_losses(torch.tensor([6.0, 1.0]), torch.tensor([4.0, 2.0]), ("a", "b")) == {"a": 1.5, "b": 0.5}
