"""tools/inspect_checkpoint.py and --dry-run with --load: what is in a checkpoint, and what a run would take of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.checkpoint.boxes import WEIGHTS, declared_box, local_boxes
from megallm.checkpoint.inspection import changes_of_tensors, tree_lines
from megallm.checkpoint.reading import open_checkpoint
from megallm.checkpoint.save import save_stream
from megallm.config import from_dict
from megallm.config.dictionary import read_yaml
from megallm.train.load_preview import load_preview
from megallm.train.saved_arguments import with_saved_model
from megallm.train.saving import save_engine
from tests.distributed.checkpoint_runs import UNTIED
from tests.distributed.launch import TINY, program_here, succeeded
from tests.distributed.parity import Case, make_engine
from tools.inspect_checkpoint import main


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints; between them one element of one tensor changes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    engine = make_engine(0, Case("", UNTIED))
    save_engine(engine, str(folder))
    box = next(box for box in local_boxes(engine.optimizer, engine.chunks, engine.mesh) if "final_norm" in box.name)
    box.tensor.view(-1)[3] += 0.5
    engine.progress.iteration = 2
    save_engine(engine, str(folder))
    return folder


def output_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_what_is_in_it_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of(capsys, root)
    assert f"{root}/iter_0000002: iteration 2" in output
    assert "manifest, headers and sizes are as written" in output
    assert "model.num_layers: 7" in output
    assert "weights: " in output and "second_moment: " in output and "norm 5" not in output
    only = output_of(capsys, root, "--kind", "weights", "--norms", "--verify")
    assert "every byte is as written" in only and "second_moment" not in only.split("\nweights: ")[1]
    # The norm of 32 ones, one of them 1.5: the root of 33.25.
    assert "norm 5.76628, 1 to 1.5" in only


def test_numbers_are_those_of_the_tensors(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(output_of(capsys, root, "--json", "--norms", "--ckpt-step", 0))
    assert (result["iteration"], result["verified"]) == (0, False)
    engine = make_engine(0, Case("", UNTIED))
    norms: dict[str, float] = {}
    for box in local_boxes(engine.optimizer, engine.chunks, engine.mesh):
        name = f"{box.kind}/{box.name}"
        assert result["tensors"][name]["shape"] == list(box.global_shape)
        norms[name] = norms.get(name, 0.0) + float(box.tensor.double().square().sum())
    assert {name: row["norm"] for name, row in result["tensors"].items()} == pytest.approx(
        {name: math.sqrt(square) for name, square in norms.items()}, rel=1e-12
    )


def test_the_configuration_is_one_that_a_run_reads(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(output_of(capsys, root, "--config"))
    values, problems = read_yaml(str(tmp_path / "run.yaml"))
    assert not problems and values["model.num_layers"] == 7
    saved = json.loads((root / "iter_0000002" / "manifest.json").read_text())["state"]["config"]
    assert all(
        getattr(getattr(from_dict(saved), path.split(".")[0]), path.split(".")[1]) == v for path, v in values.items()
    )


def test_a_difference_is_told_to_the_element(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = root / "iter_0000000", root / "iter_0000002"
    with pytest.raises(SystemExit, match="1"):
        main([str(first), "--diff", str(second)])
    output = capsys.readouterr().out
    assert "iteration: 0 -> 2" in output
    assert "weights/decoder.final_norm.weight: values: 1 element differs, at most by 0.5, at [" in output
    assert "], norm 0.5" in output
    assert output.count(" differ") == 1
    copy = shutil.copytree(first, root.parent / "copy" / first.name)
    assert "are the same, bit for bit" in output_of(capsys, first, "--diff", copy)


def test_tensors_of_other_names_shapes_and_types_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        boxes = [declared_box(WEIGHTS, key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
        return save_stream(str(tmp_path / name), 1, [boxes], tensors.values(), {"config": {}}).folder

    ones = torch.ones(4)
    one = write("one", {"same": ones * math.nan, "gone": ones, "shape": ones, "type": ones, "nan": ones})
    two = write(
        "two", {"same": ones * math.nan, "new": ones, "shape": ones[:3], "type": ones.bfloat16(), "nan": ones / 0}
    )
    with pytest.raises(SystemExit):
        main([str(one), "--diff", str(two), "--json"])
    changes: dict[str, Any] = json.loads(capsys.readouterr().out)["tensors"]
    assert {name: change["what"] for name, change in changes.items()} == {
        "weights/gone": "only in the first",
        "weights/shape": "shape [4] -> [3]",
        "weights/type": "type F32 -> BF16",
        "weights/nan": "values",
        "weights/new": "only in the second",
    }
    assert changes["weights/nan"]["num_elements"] == 4 and changes["weights/nan"]["largest"] == math.inf
    assert changes["weights/type"]["num_elements"] == 0
    assert "4 NOT FINITE" in output_of(capsys, two, "--norms")


def test_zeros_of_two_signs_and_two_nans_are_different_bits(tmp_path: Path) -> None:
    bits = torch.tensor([0, -(2**31), 0x7FC00000, 0x7FC00001, 5], dtype=torch.int32)
    folders = []
    for name, values in (("one", bits[[4, 0, 2]]), ("two", bits[[4, 1, 3]]), ("three", bits[[4, 0, 2]])):
        boxes = [declared_box(WEIGHTS, "a", torch.float32, (3,))]
        stream = save_stream(str(tmp_path / name), 1, [boxes], [values.view(torch.float32)], {"config": {}})
        folders.append(stream.folder)
    one, two, three = (open_checkpoint(folder) for folder in folders)
    with one, two, three:
        change = changes_of_tensors(one, two)["weights/a"]
        assert (change.num_elements, change.largest, change.element) == (2, 0.0, (1,))
        assert changes_of_tensors(one, three) == {}


def test_damage_is_found_where_it_is_read(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(root / "iter_0000002", tmp_path / "iter_0000002")
    file = folder / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    output_of(capsys, folder)
    for flags in (["--verify"], ["--norms"], ["--diff", str(root / "iter_0000002")]):
        with pytest.raises(SystemExit, match="2"):
            main([str(folder), *flags])
        assert "rank_00000.safetensors is damaged between bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere holds no complete checkpoint"),
        (["ROOT", "--ckpt-step", "7"], "iter_0000007 is not there"),
        (["ROOT", "--kind", "moment"], "holds weights, first_moment, second_moment"),
        (["ROOT", "--norm"], "the nearest is --norms"),
    ],
)
def test_mistakes_are_one_sentence(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(root) if word == "ROOT" else word for word in arguments])
    assert sentence in capsys.readouterr().err


def test_layer_ten_comes_behind_layer_nine() -> None:
    names = [f"layers.{number}.{part}" for number in (10, 9, 1) for part in ("up", "down")] + ["embedding.word.weight"]
    assert [(depth, shown) for depth, shown, _ in tree_lines(names)] == [
        (0, "embedding.word.weight"),
        (0, "layers"),
        *[(depth, part) for number in ("1", "9", "10") for depth, part in ((1, number), (2, "down"), (2, "up"))],
    ]


def test_a_run_can_be_asked_what_it_would_take_up(root: Path) -> None:
    engine = make_engine(0, Case("", UNTIED | {"checkpoint.load": str(root), "optimizer.lr": 0.5}))
    first, amount, *told = load_preview(engine.config, 1)
    assert first == f"Loading: continuing from {root}/iter_0000002, iteration 2"
    total = sum(file.stat().st_size for file in (root / "iter_0000002").glob("*.safetensors"))
    own = sum(box.tensor.nbytes for box in local_boxes(engine.optimizer, engine.chunks, engine.mesh))
    assert amount.startswith(f"{own:,} of its {total:,} bytes in 1 files would be read")
    assert told == ["changed since it was saved: optimizer.lr: 0.01 -> 0.5"]
    weights = make_engine(0, Case("", UNTIED | {"checkpoint.load": str(root), "checkpoint.finetune": True})).config
    assert load_preview(weights, 1)[1].startswith(f"{own // 3:,} of its")
    other = make_engine(0, Case("", UNTIED | {"checkpoint.load": str(root), "model.num_layers": 2})).config
    with pytest.raises(ValueError, match="num_layers is 7 there and 2 here"):
        load_preview(other, 1)


def test_a_run_is_told_from_which_checkpoint_a_damaged_one_sends_it_back(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    file = tmp_path / "copy" / "iter_0000002" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    settings = {"checkpoint.load": str(tmp_path / "copy")}
    config = make_engine(0, Case("", UNTIED | settings)).config
    with pytest.raises(ValueError, match=r"rank_00000\.safetensors has .*--allow-fallback continues from iter_0000000"):
        load_preview(config, 1)
    config = make_engine(0, Case("", UNTIED | settings | {"checkpoint.allow_fallback": True})).config
    first, going_back, *_ = load_preview(config, 1)
    assert first.endswith("iter_0000000, iteration 0") and "Going back to iter_0000000" in going_back
    # The model is taken from the same one: of the damage to tensors only the run itself can know.
    (file.parent / "manifest.json").unlink()
    named = replace(config, checkpoint=replace(config.checkpoint, use_checkpoint_args=True))
    _, notes = with_saved_model(named)
    assert "Going back to iter_0000000" in notes[0]
    with pytest.raises(ValueError, match="--allow-fallback continues from iter_0000000"):
        with_saved_model(replace(named, checkpoint=replace(named.checkpoint, allow_fallback=False)))


@pytest.mark.slow
def test_a_dry_run_tells_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--load", str(tmp_path), "--dry-run", "--world-size", "2"]
    assert "holds no checkpoint, the run would start afresh" in succeeded(program_here(capsys, *TINY, *flags)).output
    refused = program_here(capsys, *TINY, *flags, "--finetune")
    assert refused.code == 2 and "holds no checkpoint, and the flags allow no start" in refused.errors
    flags[1] += "/elsewhere"
    elsewhere = "elsewhere is not on this machine; a run that finds nothing there "
    assert f"{elsewhere}starts afresh" in succeeded(program_here(capsys, *TINY, *flags)).output
    assert f"{elsewhere}is refused" in succeeded(program_here(capsys, *TINY, *flags, "--finetune")).output
