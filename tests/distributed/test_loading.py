"""What of a checkpoint is taken up, what is told of changes, and which changes are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.checkpoint.boxes import WEIGHTS, local_boxes
from megallm.checkpoint.load import find_checkpoints
from megallm.checkpoint.manifest import read_manifest
from megallm.config.fields import all_fields
from megallm.config.tree import Config
from megallm.train import changes
from megallm.train.engine import Engine
from megallm.train.resume import TakenUp, load_engine, take_up
from megallm.train.saving import save_engine
from tests.distributed.checkpoint_runs import UNTIED, SavedRuns
from tests.distributed.launch import TINY, Ended, program_here, read_lines, succeeded, torchrun, without
from tests.distributed.parity import Case, make_engine
from tests.distributed.parity_cases import TWO_PER_MICRO_BATCH
from tests.distributed.pool import WorkerPool

STEP = 5


def saved_engine(root: Path, **settings: Any) -> Engine:
    """An engine with values and counters that none has at its start, and its checkpoint."""
    engine = engine_with(**settings)
    progress = engine.progress
    progress.iteration, progress.consumed_samples, progress.consumed_valid_samples = STEP, 40, 16
    progress.position.fill_(32.0)
    progress.num_updates.fill_(4.0)
    for shard in engine.optimizer.shards:
        shard.state.num_updates.fill_(4.0)
    for number, box in enumerate(local_boxes(engine.optimizer, engine.chunks, engine.mesh)):
        box.tensor.uniform_(number, number + 1)
    save_engine(engine, str(root), {"data": "news"})
    return engine


def engine_with(**settings: Any) -> Engine:
    return make_engine(0, Case("", UNTIED | {f"checkpoint.{name}": value for name, value in settings.items()}))


def values(engine: Engine) -> dict[str, torch.Tensor]:
    boxes = local_boxes(engine.optimizer, engine.chunks, engine.mesh)
    return {box.key: box.tensor.clone() for box in boxes}


def counters(engine: Engine) -> tuple[float, ...]:
    progress = engine.progress
    updates = {float(shard.state.num_updates) for shard in engine.optimizer.shards}
    return (
        progress.iteration,
        progress.consumed_samples,
        progress.consumed_valid_samples,
        float(progress.position),
        float(progress.num_updates),
        *updates,
    )


@pytest.mark.parametrize(
    ("settings", "taken_up", "wanted"),
    [
        ({}, TakenUp.ALL, (STEP, 40, 16, 32.0, 4.0, 4.0)),
        ({"no_load_optim": True}, TakenUp.ALL_BUT_OPTIMIZER, (STEP, 40, 16, 0.0, 0.0, 0.0)),
        ({"finetune": True}, TakenUp.WEIGHTS, (0, 0, 0, 0.0, 0.0, 0.0)),
        ({"finetune": True, "no_load_optim": True}, TakenUp.WEIGHTS, (0, 0, 0, 0.0, 0.0, 0.0)),
    ],
    ids=["all", "no optimizer", "finetune", "finetune wins"],
)
def test_the_flags_say_what_is_taken_up(
    tmp_path: Path, settings: dict[str, Any], taken_up: TakenUp, wanted: tuple[float, ...]
) -> None:
    saved = values(saved_engine(tmp_path))
    engine = engine_with(load=str(tmp_path), **settings)
    fresh = values(engine)
    loaded = take_up(engine, {"data": "news"})
    assert loaded is not None and loaded.taken_up is taken_up
    assert counters(engine) == wanted
    for key, tensor in values(engine).items():
        comes_from_there = taken_up is TakenUp.ALL or key.startswith(WEIGHTS)
        assert torch.equal(tensor, saved[key] if comes_from_there else fresh[key]), key


def test_a_checkpoint_without_an_optimizer_is_a_third_and_asks_how_to_go_on(tmp_path: Path) -> None:
    saved = values(saved_engine(tmp_path, no_save_optim=True))
    (folder,) = find_checkpoints(str(tmp_path))
    weights = sum(tensor.nbytes for key, tensor in saved.items() if key.startswith(WEIGHTS))
    (file,) = read_manifest(folder).files
    assert file.num_bytes - file.data_begin == weights == sum(tensor.nbytes for tensor in saved.values()) // 3
    with pytest.raises(
        ValueError, match=r"holds weights, but no first_moment.*--finetune begins.*--no-load-optim goes on"
    ):
        load_engine(engine_with(), str(tmp_path))
    for settings, iteration in (({"no_load_optim": True}, STEP), ({"finetune": True}, 0)):
        engine = engine_with(**settings)
        assert load_engine(engine, str(tmp_path)) is not None
        assert engine.progress.iteration == iteration


def test_a_pretrained_checkpoint_counts_until_there_is_one_of_the_run(tmp_path: Path) -> None:
    pretrained, own = tmp_path / "pretrained", tmp_path / "own"
    saved_engine(pretrained)
    engine = engine_with(load=str(own), pretrained_checkpoint=str(pretrained))
    loaded = take_up(engine, {"data": "other"})
    assert loaded is not None and loaded.taken_up is TakenUp.WEIGHTS
    assert (loaded.folder.parent, engine.progress.iteration) == (pretrained, 0)
    engine.progress.iteration = 2
    save_engine(engine, str(own))
    loaded = take_up(engine)
    assert loaded is not None and loaded.taken_up is TakenUp.ALL
    assert (loaded.folder.parent, engine.progress.iteration) == (own, 2)
    missing = engine_with(load=str(tmp_path / "none"), pretrained_checkpoint=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="nothing holds no checkpoint"):
        take_up(missing)


@pytest.mark.parametrize("flag", ["finetune", "exit_on_missing_checkpoint"])
def test_nothing_to_load_is_refused_where_that_was_said(tmp_path: Path, flag: str) -> None:
    assert take_up(engine_with(load=str(tmp_path))) is None
    with pytest.raises(ValueError, match=f"holds no checkpoint, and --{flag.replace('_', '-')} allows no start"):
        take_up(engine_with(load=str(tmp_path), **{flag: True}))


def test_another_order_of_the_data_matters_only_to_who_goes_on(tmp_path: Path) -> None:
    saved_engine(tmp_path)
    for settings in ({}, {"no_load_optim": True}):
        with pytest.raises(ValueError, match=r"data: news there, code here.*--allow-data-change"):
            load_engine(engine_with(**settings), str(tmp_path), {"data": "code"})
    for settings in ({"finetune": True}, {"allow_data_change": True}):
        assert load_engine(engine_with(**settings), str(tmp_path), {"data": "code"}) is not None


# Settings that change nothing in the shape of any tensor of this model.
SAME_SHAPES = {"model.rotary_base": 5e5, "model.norm_epsilon": 1e-6, "model.activation": "geglu", "model.num_layers": 6}


@pytest.mark.parametrize(
    "setting",
    [
        "model.num_layers",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SAME_SHAPES if name != "model.num_layers"),
    ],
)
def test_another_model_whose_tensors_fit_is_loaded_where_that_is_allowed(tmp_path: Path, setting: str) -> None:
    saved_engine(tmp_path)
    changed = UNTIED | {setting: SAME_SHAPES[setting]}
    name = setting.removeprefix("model.")
    with pytest.raises(ValueError, match=f"another model: {name} is .* there and .* here.*--allow-model-change"):
        load_engine(make_engine(0, Case("", changed)), str(tmp_path))
    loaded = load_engine(make_engine(0, Case("", changed | {"checkpoint.allow_model_change": True})), str(tmp_path))
    assert loaded is not None
    assert any(note.startswith(f"changed since it was saved: {setting}: ") for note in loaded.notes)


def test_tensors_that_do_not_fit_are_refused_all_the_same(tmp_path: Path) -> None:
    saved_engine(tmp_path)
    changed = UNTIED | {"model.hidden_size": 64, "checkpoint.allow_model_change": True}
    with pytest.raises(ValueError, match=r"with shape \(32,\), but this model wants \(64,\)"):
        load_engine(make_engine(0, Case("", changed)), str(tmp_path))


def test_every_setting_that_changes_is_told_but_for_those_named(tmp_path: Path) -> None:
    """A new field of the tree is told without anybody's doing."""
    told = {
        entry.path
        for entry in all_fields()
        if not entry.path.startswith(changes._SILENT_SECTIONS) and entry.path not in changes._SILENT
    }
    assert {entry.section for entry in all_fields() if entry.path in told} == {
        *("model", "parallel", "training", "optimizer", "data")
    }
    engine = saved_engine(tmp_path)
    for path in told:
        config = _altered(engine.config, path)
        (line,) = changes.changes(engine.config, {}, config, 1)
        assert line.startswith(f"{path}: "), line


def _altered(config: Config, path: str) -> Config:
    section, name = path.split(".")
    part = getattr(config, section)
    return replace(config, **{section: replace(part, **{name: "something else"})})


@pytest.mark.slow
def test_layout_and_versions_are_told(pool: WorkerPool, saved_runs: SavedRuns) -> None:
    root, _ = saved_runs.of(Case("tensor 2", UNTIED, tp=2, layout=TWO_PER_MICRO_BATCH))
    engine = make_engine(0, Case("", UNTIED))
    loaded = load_engine(engine, root)
    assert loaded is not None
    assert "changed since it was saved: parallel.tensor_model_parallel_size: 2 -> 1" in loaded.notes
    assert "changed since it was saved: processes: 2 -> 1" in loaded.notes
    made_by = {"megallm": "0.0.1", "torch": torch.__version__, "world_size": 1}
    assert changes.changes(engine.config, made_by, engine.config, 1)[0].startswith("megallm: 0.0.1 -> ")


# As a person starts it


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def start(folder: Path, *flags: str, base: list[str] = TINY) -> Ended:
        return program_here(capsys, *base, "--save", str(folder), *flags)

    return start


@pytest.mark.slow
def test_a_model_is_taken_from_its_checkpoint(tmp_path: Path, run: Run) -> None:
    run_folder, other = tmp_path / "run", tmp_path / "other"
    succeeded(run(run_folder, "--exit-interval", "3"))
    few = without(TINY, "--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--vocab-size")
    few = without(few, "--tokenizer-type")
    shutil.copytree(run_folder, other)
    metrics = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    succeeded(run(run_folder, "--load", str(run_folder), "--metrics-jsonl", str(metrics[0])))
    flags = ["--load", str(other), "--use-checkpoint-args", "--num-layers", "9", "--metrics-jsonl", str(metrics[1])]
    # In two processes, of which one reads the checkpoint and tells the other before there is a mesh.
    ended = succeeded(torchrun(2, "pretrain_gpt.py", *few, "--save", str(other), *flags))
    assert "model.num_layers is 4 as in " in ended.errors and "not 9 as the flags say" in ended.errors
    first, second = (
        [(line["iteration"], line["lm_loss"]) for line in read_lines(path) if "lm_loss" in line] for path in metrics
    )
    assert [iteration for iteration, _ in first] == [4, 5, 6]
    assert dict(first) == pytest.approx(dict(second), rel=1e-11, abs=0.0)
    refused = run(other, "--use-checkpoint-args", "--load", str(tmp_path / "none"))
    assert refused.code == 2 and "none holds no checkpoint" in refused.errors


@pytest.mark.slow
def test_fine_tuning_begins_with_the_weights_and_goes_on_with_its_own(tmp_path: Path, run: Run) -> None:
    pretrained, own = str(tmp_path / "pretrained"), str(tmp_path / "own")
    succeeded(run(Path(pretrained)))
    flags = ["--load", own, "--pretrained-checkpoint", pretrained, "--exit-interval", "4"]
    begun = succeeded(run(Path(own), *flags))
    assert f"a new run begins with the weights of {pretrained}/iter_0000006" in begun.output
    again = succeeded(run(Path(own), *flags))
    assert f"continuing from {own}/iter_0000004" in again.output
    missing = run(Path(own), "--load", str(tmp_path / "none"), "--finetune")
    assert missing.code == 2 and "--finetune allows no start without one" in missing.errors
