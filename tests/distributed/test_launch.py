"""The programs as a person starts them: alone, under torchrun, on two machines, stopped and resumed, with mistakes."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import pretrain_gpt
from megallm.schedule import Kind, Timeline
from tests.distributed.launch import (
    COMPARED,
    ROOT,
    TINY,
    Ended,
    program_here,
    python,
    read_lines,
    run,
    series,
    succeeded,
    torchrun,
    training_lines,
    two_machines,
    validation_lines,
    without,
)
from tools import evaluate, generate

Here = Callable[..., Ended]

FIELDS = {
    "iteration",
    "consumed_samples",
    "lm_loss",
    "loss_scale",
    "grad_norm",
    "learning_rate",
    "global_batch_size",
    "skipped",
    "step_time_ms",
    "tokens_per_second",
}
TIMES = {"step_time_ms", "tokens_per_second"}
NUMBER = r"[-+0-9.eE]+"
LOG_LINE = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(?P<iteration>\d+)/ +(?P<of>\d+) \|"
    r" consumed samples: +(?P<samples>\d+) \|"
    rf" elapsed time per iteration \(ms\): (?P<time>{NUMBER}) \|"
    rf" throughput per GPU \(TFLOP/s/GPU\): {NUMBER} \|"
    rf" learning rate: (?P<rate>{NUMBER}) \|"
    r" global batch size: +(?P<batch>\d+) \|"
    rf" lm loss: (?P<loss>{NUMBER}) \|"
    rf" loss scale: {NUMBER} \|"
    rf" grad norm: (?P<norm>{NUMBER}) \|"
    r" number of skipped iterations: +(?P<skipped>\d+) \|"
    r" number of nan iterations: +(?P<nan>\d+) \|",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Run:
    """A run's folder and what it printed."""

    folder: Path
    ended: Ended

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps in one process, with everything that a run can tell."""
    folder = tmp_path_factory.mktemp("single")
    ended = python(
        "pretrain_gpt.py",
        *TINY,
        *("--metrics-jsonl", str(folder / "metrics.jsonl"), "--tensorboard-dir", str(folder / "tensorboard")),
        *("--timeline", str(folder / "timeline"), "--timeline-step", "2"),
    )
    return Run(folder, succeeded(ended))


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    """Starts the program in this process: `program_here`."""
    return partial(program_here, capsys)


def assert_same_series(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Every scalar but the times, within the rounding of sums in another order."""
    assert [line["iteration"] for line in got] == [line["iteration"] for line in wanted]
    for line, want in zip(got, wanted, strict=True):
        assert line.keys() == want.keys()
        for name in want.keys() - TIMES:
            assert line[name] == pytest.approx(want[name], rel=1e-12, abs=0.0), (name, line["iteration"])


# What a run tells


def test_metrics_hold_every_scalar_of_every_step(single: Run) -> None:
    lines = training_lines(single.metrics)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() == FIELDS for line in lines)
    assert [line["consumed_samples"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert {(line["global_batch_size"], line["skipped"]) for line in lines} == {(4, 0)}
    assert [line["learning_rate"] for line in lines[:3]] == pytest.approx([0.0, 5e-3, 1e-2])
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(4 * 16 / (line["step_time_ms"] / 1e3))
    checks = validation_lines(single.metrics)
    assert [check["iteration"] for check in checks] == [3, 6]
    assert all(check.keys() == {"iteration", "consumed_samples", "valid_lm_loss"} for check in checks)
    # In order: each evaluation follows its step.
    assert [line["iteration"] for line in series(single.metrics)] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_log_line_has_the_fields_that_scripts_parse(single: Run) -> None:
    found = [match.groupdict() for match in LOG_LINE.finditer(single.ended.output)]
    assert [(line["iteration"], line["of"], line["samples"], line["batch"]) for line in found] == [
        ("2", "6", "8", "4"),
        ("4", "6", "16", "4"),
        ("6", "6", "24", "4"),
    ]
    lines = training_lines(single.metrics)
    for line, (first, second) in zip(found, zip(lines[::2], lines[1::2], strict=True), strict=True):
        assert float(line["loss"]) == pytest.approx((first["lm_loss"] + second["lm_loss"]) / 2, rel=1e-6)
        assert float(line["time"]) == pytest.approx((first["step_time_ms"] + second["step_time_ms"]) / 2, abs=0.06)
        assert float(line["rate"]) == pytest.approx(second["learning_rate"], rel=1e-6)
        assert float(line["norm"]) == pytest.approx(second["grad_norm"], abs=6e-4)
        assert (line["skipped"], line["nan"]) == ("0", "0")
    check = validation_lines(single.metrics)[0]
    assert f" validation loss at iteration 3 | lm loss value: {check['valid_lm_loss']:.6E} |" in single.ended.output


def test_tensorboard_holds_the_same_scalars(single: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(single.folder / "tensorboard"))
    events.Reload()
    wanted = [(line["iteration"], line["lm_loss"]) for line in training_lines(single.metrics)]
    assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("lm_loss")] == wanted
    assert [event.step for event in events.Scalars("valid_lm_loss")] == [3, 6]
    compared = {f"{kind}_{name}" for kind in ("predicted", "measured") for name in ("step_seconds", "memory_bytes")}
    assert set(events.Tags()["scalars"]) == FIELDS - {"iteration", "consumed_samples"} | {"valid_lm_loss"} | compared


def test_timeline_of_one_process(single: Run) -> None:
    timeline = Timeline.from_json((single.folder / "timeline.rank0.jsonl").read_text())
    assert [(event.action.kind, event.action.micro_batch) for event in timeline.compute] == [
        (kind, number) for number in range(4) for kind in (Kind.F, Kind.B)
    ]
    assert all(event.start < event.end for event in timeline.compute)
    assert all(one.end <= other.start for one, other in pairwise(timeline.compute))


# Layouts


THREADS = """
import os
import sys
from pathlib import Path
sys.path.insert(0, ".")
import pretrain_gpt
pretrain_gpt.main(sys.argv[1:])
names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
# One write a process: the parts of a `print` from several of them can mix.
os.write(1, f"threads {names}\\n".encode())
"""


@pytest.fixture
def counting(tmp_path: Path) -> str:
    """The program, which names its threads at the end."""
    script = tmp_path / "count_threads.py"
    script.write_text(THREADS)
    return str(script)


def assert_no_thread_of_a_process_group_is_left(num_processes: int, *ended: Ended) -> None:
    """One that still held a tensor when the interpreter ends would now and then abort a run that went well."""
    counted = [line for one in ended for line in one.output.splitlines() if line.startswith("threads")]
    assert len(counted) == num_processes
    # Without /proc there are no names, and nothing is shown.
    assert all("'" in line for line in counted) or not Path("/proc/self/task").is_dir()
    assert not [line for line in counted if "gloo" in line]


def test_two_processes(single: Run, counting: str, tmp_path: Path) -> None:
    flags = ["--metrics-jsonl", str(tmp_path / "metrics.jsonl"), "--use-distributed-optimizer"]
    ended = succeeded(torchrun(2, counting, *TINY, *flags))
    assert_same_series(series(tmp_path / "metrics.jsonl"), series(single.metrics))
    # The first process speaks for all.
    assert len(LOG_LINE.findall(ended.output)) == 3
    assert_no_thread_of_a_process_group_is_left(2, ended)


@pytest.mark.slow
def test_two_machines(single: Run, counting: str, tmp_path: Path) -> None:
    """Tensor and pipeline parallelism across two launchers, interleaved, with the pipeline's timeline."""
    ended = two_machines(
        2,
        counting,
        *TINY,
        *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
        *("--num-virtual-stages-per-pipeline-rank", "2", "--timeline-step", "3"),
        *("--metrics-jsonl", str(tmp_path / "metrics.jsonl"), "--timeline", str(tmp_path / "timeline")),
    )
    for machine in ended:
        succeeded(machine)
    assert_same_series(series(tmp_path / "metrics.jsonl"), series(single.metrics))
    assert sorted(len(LOG_LINE.findall(machine.output)) for machine in ended) == [0, 3]
    assert_no_thread_of_a_process_group_is_left(4, *ended)
    files = sorted(tmp_path.glob("timeline.rank*.jsonl"))
    assert [file.name for file in files] == ["timeline.rank0.jsonl", "timeline.rank1.jsonl"]
    for rank, file in enumerate(files):
        timeline = Timeline.from_json(file.read_text())
        assert {event.rank for event in timeline.events} == {rank}
        # 4 micro-batches through two stages, forward and backward
        assert len(timeline.compute) == 16
        assert {event.action.stage for event in timeline.compute} == {rank, rank + 2}


@pytest.mark.slow
def test_stopped_and_resumed_under_another_layout(single: Run, tmp_path: Path) -> None:
    flags = [*TINY, "--save", str(tmp_path / "checkpoints"), "--metrics-jsonl", str(tmp_path / "metrics.jsonl")]
    stopped = succeeded(
        torchrun(2, "pretrain_gpt.py", *flags, "--tensor-model-parallel-size", "2", "--exit-interval", "4")
    )
    assert "left after iteration 4" in stopped.output
    # The second step was watched: who leaves early is told, too, how the plan was.
    assert "predicted and measured" in stopped.output
    assert [line["iteration"] for line in training_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    load = ["--load", str(tmp_path / "checkpoints")]
    resumed = succeeded(torchrun(2, "pretrain_gpt.py", *flags, *load, "--pipeline-model-parallel-size", "2"))
    assert f"continuing from {tmp_path / 'checkpoints' / 'iter_0000004'}" in resumed.output
    # One file, to which the second run appended, as if there had been one run: steps and evaluations.
    assert_same_series(series(tmp_path / "metrics.jsonl"), series(single.metrics))
    assert (tmp_path / "checkpoints" / "iter_0000006").is_dir()
    compared = [line for line in read_lines(tmp_path / "metrics.jsonl") if COMPARED in line]
    assert [line["iteration"] for line in compared] == [4, 6]
    assert compared[1]["predicted_memory_bytes"] == pytest.approx(compared[1][COMPARED], rel=0.2)
    assert {"predicted_step_seconds", "measured_bubble"} <= compared[1].keys()


@pytest.mark.slow
def test_a_run_that_is_over_says_so(tmp_path: Path, here: Here) -> None:
    flags = [*without(TINY, "--eval-interval", "--eval-iters"), "--save", str(tmp_path / "checkpoints")]
    succeeded(here(*flags))
    again = succeeded(here(*flags, "--load", str(tmp_path / "checkpoints")))
    assert "nothing was trained and nothing saved: iteration 6" in again.output
    assert not LOG_LINE.search(again.output)


# Mistakes

MISTAKES = {
    "missing data": (
        [*without(TINY, "--mock-data"), "--data-path", "/nowhere/text_document"],
        r"/nowhere/text_document\.idx does not exist",
    ),
    "world size": (
        [*TINY, "--tensor-model-parallel-size", "4"],
        "cannot be laid out|start 4|multiple of 4|4 processes",
    ),
    "heads": (
        [*without(TINY, "--num-attention-heads"), "--num-attention-heads", "5"],
        "a width of 32 cannot be cut into 5 heads",
    ),
    "no GPU": ([*without(TINY, "--device"), "--device", "cuda"], "--device cuda was asked for"),
    "unknown flag": ([*TINY, "--num-layer", "4"], r"--num-layer is unknown.*--num-layers"),
    "nothing given": ([], "--num-layers"),
}


def mistakes() -> list[Any]:
    """Without the visible GPU's mistake where there is one."""
    import torch

    return [
        pytest.param(name, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))
        if name == "no GPU"
        else name
        for name in MISTAKES
    ]


def assert_one_clear_answer(ended: Ended, wanted: str) -> None:
    assert ended.code == 2, ended.errors
    assert re.search(wanted, ended.errors), ended.errors
    assert "Traceback" not in ended.errors
    assert re.match(r"(pretrain_gpt|generate)\.py: ", ended.errors), ended.errors
    assert not LOG_LINE.search(ended.output)


@pytest.mark.parametrize("mistake", mistakes())
def test_mistake_in_one_process(mistake: str, here: Here) -> None:
    flags, wanted = MISTAKES[mistake]
    assert_one_clear_answer(here(*flags), wanted)


@pytest.fixture(scope="session")
def checkpoint_of_another_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("other") / "checkpoints")
    flags = [*without(TINY, "--train-iters", "--num-layers", "--eval-interval"), "--num-layers", "2"]
    pretrain_gpt.main([*flags, "--train-iters", "2", "--save", folder])
    return folder


@pytest.mark.slow
def test_another_model_in_one_process(checkpoint_of_another_model: str, here: Here) -> None:
    ended = here(*TINY, "--load", checkpoint_of_another_model)
    assert_one_clear_answer(ended, "saved from another model: num_layers is 2 there and 4 here")


def assert_one_clear_answer_of_two(ended: Ended, wanted: str) -> None:
    """The launcher adds its own report, with a traceback of itself; the program gives its answer once."""
    assert ended.code != 0
    assert len(re.findall(wanted, ended.errors)) == 1, ended.errors
    assert re.search(r"exitcode +: 2 ", ended.errors), ended.errors
    assert f"{ROOT}/megallm/" not in ended.errors
    assert 'pretrain_gpt.py", line' not in ended.errors


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["missing data", "world size", mistakes()[3], "unknown flag"])
def test_mistake_in_two_processes(mistake: str) -> None:
    flags, wanted = MISTAKES[mistake]
    begin = time.monotonic()
    assert_one_clear_answer_of_two(torchrun(2, "pretrain_gpt.py", *flags, timeout=120.0), wanted)
    assert time.monotonic() - begin < 100.0, "nobody waits for a message that does not come"


@pytest.mark.slow
def test_another_model_in_two_processes(checkpoint_of_another_model: str) -> None:
    flags = ["--pipeline-model-parallel-size", "2", "--load", checkpoint_of_another_model]
    ended = torchrun(2, "pretrain_gpt.py", *TINY, *flags, timeout=120.0)
    assert_one_clear_answer_of_two(ended, "saved from another model: num_layers is 2 there and 4 here")


# From text to text

MODEL = [
    *("--num-layers", "4"),
    *("--hidden-size", "48"),
    *("--num-attention-heads", "4"),
    "--group-query-attention",
    *("--num-query-groups", "2"),
    *("--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm"),
    "--swiglu",
    "--disable-bias-linear",
    *("--seq-length", "32"),
    *("--micro-batch-size", "4"),
    *("--global-batch-size", "16"),
    *("--lr", "1e-2"),
    *("--lr-warmup-iters", "3"),
    *("--split", "90,10,0"),
    *("--device", "cpu"),
    *("--tokenizer-type", "HuggingFaceTokenizer"),
]


@dataclass(frozen=True)
class Text:
    """A small dataset of real text, and a model trained on it in float64."""

    folder: Path

    @property
    def prefix(self) -> str:
        return f"{self.folder}/python_text_document"

    @property
    def flags(self) -> list[str]:
        return [*MODEL, *("--data-path", self.prefix), *self.tokenizer]

    @property
    def tokenizer(self) -> list[str]:
        return ["--tokenizer-model", f"{self.folder}/tokenizer.json"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    text = Text(tmp_path_factory.mktemp("text"))
    folder = str(text.folder)
    succeeded(python("tools/collect_text.py", "--output", f"{folder}/text.jsonl", "--max-megabytes", "0.4"))
    succeeded(
        python(
            "tools/train_tokenizer.py",
            *("--input", f"{folder}/text.jsonl", "--vocab-size", "400", "--output", f"{folder}/tokenizer.json"),
        )
    )
    succeeded(
        python(
            "tools/preprocess_data.py",
            *("--input", f"{folder}/text.jsonl", "--output-prefix", f"{folder}/python", "--append-eod"),
            *("--tokenizer-type", "HuggingFaceTokenizer", *text.tokenizer),
        )
    )
    pretrain_gpt.main(
        [
            *text.flags,
            *("--train-iters", "60", "--fp64", "--save", f"{folder}/checkpoints"),
            *("--eval-interval", "60", "--eval-iters", "2", "--metrics-jsonl", f"{folder}/metrics.jsonl"),
        ]
    )
    return text


@pytest.mark.slow
def test_loss_falls_on_real_text(text: Text) -> None:
    losses = [line["lm_loss"] for line in training_lines(text.folder / "metrics.jsonl")]
    assert losses[0] == pytest.approx(6.0, abs=0.3), "as many nats as ln 400 at the start"
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    assert validation_lines(text.folder / "metrics.jsonl")[0]["valid_lm_loss"] < losses[0] - 1.0


@pytest.mark.slow
def test_bfloat16_trains_as_float64_does(text: Text, tmp_path: Path) -> None:
    flags = ["--train-iters", "60", "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce"]
    metrics = tmp_path / "metrics.jsonl"
    succeeded(torchrun(2, "pretrain_gpt.py", *text.flags, *flags, "--metrics-jsonl", str(metrics)))
    losses = [line["lm_loss"] for line in training_lines(metrics)]
    wanted = [line["lm_loss"] for line in training_lines(text.folder / "metrics.jsonl")]
    assert losses[0] == pytest.approx(wanted[0], abs=0.02)
    assert sum(losses[-5:]) == pytest.approx(sum(wanted[-5:]), abs=0.5)


@pytest.mark.slow
def test_generation_does_not_depend_on_the_layout(text: Text, here: Here) -> None:
    # The tokenizer is found where the training found it.
    flags = ["--load", f"{text.folder}/checkpoints", "--prompt", "def main(", "--num-tokens", "24", "--device", "cpu"]
    alone = succeeded(python("tools/generate.py", *flags, "--temperature", "0"))
    assert alone.output.startswith("def main(")
    assert len(alone.output) > len("def main(") + 12
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    together = succeeded(torchrun(4, "tools/generate.py", *flags, *layout, "--temperature", "0"))
    assert together.output == alone.output
    sampled = [succeeded(here(*flags, "--seed", seed, main=generate.main)).output for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.slow
def test_prompts_of_a_file_are_continued_one_by_one_and_end_where_they_are_to(
    text: Text, tmp_path: Path, here: Here
) -> None:
    flags = ["--load", f"{text.folder}/checkpoints", "--num-tokens", "12", "--device", "cpu", "--json"]
    (tmp_path / "prompts.txt").write_text("def main(\n\nimport re\nimport os\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--batch-size", "2"]
    ended = succeeded(torchrun(2, "tools/generate.py", *flags, *prompts))
    first, second, third = map(json.loads, ended.output.splitlines())
    assert [it["prompt"] for it in (first, second, third)] == ["def main(", "import re", "import os"]
    alone = succeeded(here(*flags, "--prompt", "import os", "--seed", "1236", main=generate.main))
    assert json.loads(alone.output) == third
    stop = first["continuation"].strip()[3]
    stopped = succeeded(here(*flags, "--prompt", "def main(", "--stop", stop, "@@@", main=generate.main))
    before = json.loads(stopped.output)["continuation"]
    assert before == first["continuation"].split(stop)[0]
    assert_one_clear_answer(here(*flags, "--prompts", str(tmp_path), main=generate.main), "cannot be read")


@pytest.mark.slow
def test_a_dataset_and_its_text_are_evaluated_alike_in_two_layouts(text: Text, tmp_path: Path, here: Here) -> None:
    flags = ["--load", f"{text.folder}/checkpoints", "--device", "cpu", "--json"]
    file = tmp_path / "held_out.py"
    file.write_text("def main(argv: list[str]) -> int:\n    return len(argv)\n" * 40)
    alone = json.loads(succeeded(here(*flags, "--text", str(file), main=evaluate.main)).output)
    assert alone["bytes"] == file.stat().st_size
    assert alone["words"] == len(file.read_text().split())
    layout = ["--pipeline-model-parallel-size", "2", "--micro-batch-size", "2", "--text", str(file)]
    together = json.loads(succeeded(torchrun(2, "tools/evaluate.py", *flags, *layout)).output)
    assert together == pytest.approx(alone, rel=1e-6)
    some = [*flags, "--data-path", text.prefix, "--max-documents", "3"]
    assert json.loads(succeeded(here(*some, main=evaluate.main)).output)["perplexity_per_token"] > 1


@pytest.mark.slow
def test_texts_are_written_during_the_training(text: Text, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    samples = ["--sample-interval", "2", "--sample-prompt", "def main(", "--sample-num-tokens", "5"]
    for layout in ([], ["--tensor-model-parallel-size", "2"]):
        more = [*samples, "--train-iters", "4", "--fp64", "--metrics-jsonl", str(metrics), *layout]
        succeeded(torchrun(2, "pretrain_gpt.py", *text.flags, *more))
    written = [(line["iteration"], line["sample"]) for line in read_lines(metrics) if "sample" in line]
    assert [iteration for iteration, _ in written] == [2, 4, 2, 4]
    assert all(sample.startswith("def main(") for _, sample in written)
    assert written[:2] == written[2:]


@pytest.mark.slow
def test_mistakes_of_generation(text: Text, tmp_path: Path, here: Here) -> None:
    content = json.loads((text.folder / "tokenizer.json").read_bytes())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (tmp_path / "other.json").write_text(json.dumps(content))
    for flags, wanted in (
        (
            ["--load", f"{text.folder}/checkpoints", "--prompt", "a", "--tokenizer-model", f"{tmp_path}/other.json"],
            "was trained with another tokenizer",
        ),
        (["--load", str(tmp_path), "--prompt", "a"], "holds no complete checkpoint"),
        (["--load", f"{text.folder}/checkpoints", "--prompt", ""], "the prompt holds no token"),
        (["--load", f"{text.folder}/checkpoints", "--prompt", "a", "--top-p", "2"], "--top-p 2.0 is not in"),
        (
            ["--load", f"{text.folder}/checkpoints", "--prompt", "a", "--tokenizer-model", "/nowhere.json"],
            "/nowhere.json",
        ),
    ):
        assert_one_clear_answer(here(*flags, "--device", "cpu", main=generate.main), wanted)


@pytest.mark.slow
def test_a_run_that_trains_nothing_evaluates_what_it_loads(tmp_path: Path, here: Here) -> None:
    metrics = ["--metrics-jsonl", str(tmp_path / "metrics.jsonl")]
    succeeded(here(*TINY, *metrics, "--save", str(tmp_path / "checkpoints")))
    skipping = [*TINY, *metrics, "--load", str(tmp_path / "checkpoints"), "--save", str(tmp_path / "others")]
    ended = succeeded(here(*skipping, "--skip-train"))
    assert "> nothing is trained, as --skip-train says\n" in ended.output
    assert [line["iteration"] for line in training_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["iteration"] for line in validation_lines(tmp_path / "metrics.jsonl")] == [3, 6, 6]
    assert not list((tmp_path / "others").glob("iter_*"))
    wanted = "the validation data has 12 samples, but this run reads up to sample 20"
    assert_one_clear_answer(here(*skipping, "--skip-train", "--eval-iters", "1"), wanted)


@pytest.mark.slow
def test_starting_imports_nothing_large_that_a_run_does_not_need() -> None:
    # torch's compiler alone takes as long as all the rest.
    large = [
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.fsdp",
        "megallm.convert",
        "sympy",
        "tensorboard",
        "wandb",
        "matplotlib",
    ]
    code = f"import sys, megallm.train.loop, megallm.generate.text; print(*(set({large}) & set(sys.modules)))"
    assert succeeded(run([sys.executable, "-c", code])).output.split() == []


@pytest.mark.slow
def test_data_that_would_end_too_early_is_refused_before_the_first_step(tmp_path: Path, here: Here) -> None:
    flags = [*without(TINY, "--eval-interval", "--eval-iters"), "--save", str(tmp_path), "--exit-interval", "3"]
    succeeded(here(*flags))
    fewer = without(TINY, "--eval-interval", "--eval-iters", "--global-batch-size")
    again = here(*fewer, "--global-batch-size", "2", "--load", str(tmp_path))
    assert_one_clear_answer(again, "the training data has 12 samples, but this run reads up to sample 18")
    assert "changed since it was saved: training.global_batch_size: 4 -> 2" in again.output


@pytest.mark.slow
def test_a_place_that_cannot_be_written_to_is_told_before_the_first_step(tmp_path: Path, here: Here) -> None:
    (tmp_path / "file").write_text("")
    for flag, place, wanted in (
        ("--save", tmp_path / "file", "--save: .*file cannot be written to"),
        ("--metrics-jsonl", tmp_path, "--metrics-jsonl .* is a folder"),
    ):
        assert_one_clear_answer(here(*TINY, flag, str(place)), wanted)
