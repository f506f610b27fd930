"""Our own checkpoints anew, and two models compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megallm.checkpoint import commit
from megallm.checkpoint.boxes import WEIGHTS, declared_box
from megallm.checkpoint.load import verify
from megallm.checkpoint.reading import open_checkpoint
from megallm.checkpoint.save import save_stream
from megallm.config import to_dict
from megallm.config.tree import ParallelConfig
from megallm.convert.command import Output, Place, check, convert, report_comparison
from megallm.convert.compare import compare
from megallm.convert.huggingface import open_folder
from megallm.convert.native import open_native, write_native
from megallm.convert.relayout import relayout
from megallm.file_lock import own_folder
from tests.unit.convert import folders

LAYOUT = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Llama after some training: weights, and a moment of each that is twice the weight."""
    tensors = folders.make_tensors(folders.llama_shapes())
    theirs = folders.write(tmp_path / "theirs", folders.LLAMA_CONFIG, tensors)
    with open_folder(theirs) as weights:
        kinds = {WEIGHTS: 1.0, "first_moment": 2.0}
        boxes = [
            declared_box(kind, name, torch.float32, shape) for kind in kinds for name, shape in weights.shapes.items()
        ]

        def values(kind: str, name: str) -> torch.Tensor:
            tensor = torch.empty(weights.shapes[name])
            weights.tensors.fill(name, (0,) * tensor.dim(), tensor)
            return tensor * kinds[kind]

        state = {"config": to_dict(weights.config), "consumed_samples": 5}
        return save_stream(str(tmp_path / "ours"), 7, [boxes], (values(b.kind, b.name) for b in boxes), state).folder


@pytest.mark.parametrize("is_whole", [True, False])
def test_files_for_another_layout_hold_the_same(tmp_path: Path, checkpoint: Path, is_whole: bool) -> None:
    folder = relayout(checkpoint, tmp_path / "new", LAYOUT, weights_only=not is_whole)
    assert folder == tmp_path / "new" / checkpoint.name
    assert len(list(folder.glob("*.safetensors"))) == 4
    list(verify(folder))
    with open_checkpoint(checkpoint) as before, open_checkpoint(folder) as after:
        kinds = [WEIGHTS, "first_moment"] if is_whole else [WEIGHTS]
        assert after.manifest.tensors.keys() == {
            name for name in before.manifest.tensors if name.split("/")[0] in kinds
        }
        for kind in kinds:
            for name, tensor in before.tensors(kind):
                assert torch.equal(after.read(kind, name), tensor), name
        # Query heads are cut in two, the first stage has the embedding.
        name = "decoder.layers.1.attention.query.weight"
        boxes = after.saved(WEIGHTS, name).boxes
        assert [(box.file, box.offset) for box in boxes] == [(2, (0, 0)), (3, (4, 0))]
        assert {box.file for box in after.saved(WEIGHTS, "embedding.word.weight").boxes} == {0, 1}
        assert ("consumed_samples" in after.manifest.state) == is_whole


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (4, 1)])
def test_a_foreign_model_comes_in_files_for_a_layout(tmp_path: Path, tp: int, pp: int) -> None:
    """At four tensor ranks each of the two groups of queries is cut."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    tensors = folders.make_tensors(folders.llama_shapes())
    with open_folder(folders.write(tmp_path / "theirs", folders.LLAMA_CONFIG, tensors)) as weights:
        folder = write_native(tmp_path / "ours", weights, parallel=parallel)
        in_two_steps = relayout(write_native(tmp_path / "one", weights), tmp_path / "two", parallel)
        with open_native(folder) as again:
            assert not list(compare(weights, again))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) == tp * pp
    assert all((folder / name).read_bytes() == (in_two_steps / name).read_bytes() for name in files)
    list(verify(folder))
    with open_checkpoint(folder) as checkpoint, open_checkpoint(in_two_steps) as other:
        assert checkpoint.manifest.tensors == other.manifest.tensors
        assert checkpoint.manifest.state == other.manifest.state


def test_weights_are_cast_and_moments_are_not(tmp_path: Path, checkpoint: Path) -> None:
    folder = relayout(checkpoint, tmp_path / "new", ParallelConfig(), torch.bfloat16)
    with open_checkpoint(checkpoint) as before, open_checkpoint(folder) as after:
        for name, tensor in before.tensors(WEIGHTS):
            assert torch.equal(after.read(WEIGHTS, name), tensor.to(torch.bfloat16))
            assert after.read("first_moment", name).dtype == torch.float32


def test_moments_are_verified_too(tmp_path: Path, checkpoint: Path) -> None:
    source, new = Place("megallm", checkpoint.parent), Place("megallm", tmp_path / "new")
    relayout(checkpoint, new.path, LAYOUT, torch.bfloat16)
    lines: list[str] = []
    check(source, new, torch.bfloat16, None, lines.append)
    assert lines == ["verified tensor by tensor: all 21 are equal", "verified the optimizer: all 21 are equal"]
    with open_checkpoint(checkpoint) as before:
        boxes = [
            declared_box(kind, name, tensor.dtype, tuple(tensor.shape))
            for kind in (WEIGHTS, "first_moment")
            for name, tensor in before.tensors(kind)
        ]
        tensors = (before.read(box.kind, box.name) for box in boxes)
        changed = (
            tensor + 1 if (box.kind, box.name) == ("first_moment", "output.weight") else tensor
            for box, tensor in zip(boxes, tensors, strict=True)
        )
        save_stream(str(tmp_path / "other"), 7, [boxes], changed, before.manifest.state)
    with pytest.raises(ValueError, match=r"first_moment/output\.weight differs by 1\.000e\+00 at .* after conversion"):
        check(source, Place("megallm", tmp_path / "other"), None, None, lines.append)


def test_what_an_earlier_save_has_left_for_good_is_told(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(commit, "remove_folder", refuse)
    lines = list[str]()
    left = [tmp_path / root / "iter_0000001.00000000000000aa.tmp" for root in ("one", "two")]
    for path in left:
        path.mkdir(parents=True)
    relayout(checkpoint, tmp_path / "one", LAYOUT, log=lines.append)
    with open_folder(tmp_path / "theirs") as weights:
        write_native(tmp_path / "two", weights, log=lines.append)
    for path in left:
        assert f"{path}, left by an earlier save, cannot be removed: Permission denied" in lines


def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"4 heads cannot be cut over 3 tensor ranks"):
        relayout(checkpoint, tmp_path / "new", ParallelConfig(tensor_model_parallel_size=3))
    with pytest.raises(ValueError, match=r"is there already"):
        relayout(checkpoint, checkpoint.parent, LAYOUT)
    assert not (tmp_path / "new").exists()
    relayout(checkpoint, checkpoint.parent, LAYOUT, overwrite=True)
    assert len(list(checkpoint.glob("*.safetensors"))) == 4


def test_a_folder_of_a_run_takes_no_other_model(tmp_path: Path, checkpoint: Path) -> None:
    run, theirs = checkpoint.parent, Place("hf", tmp_path / "theirs")
    output = Output(None, ParallelConfig(), "local", overwrite=True, max_shard_bytes=10**9, weights_only=False)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with pytest.raises(ValueError, match=r"holds a run, up to iter_0000007: .* give another folder to --save"):
        convert(theirs, Place("megallm", run), output)
    with pytest.raises(ValueError, match=r"holds a model in the format of --to megallm, not of --to hf"):
        convert(theirs, Place("hf", run), output)
    with open_folder(theirs.path) as weights, pytest.raises(ValueError, match=r"holds a run, up to iter_0000007"):
        write_native(run, replace(weights, iteration=7), overwrite=True)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    place = Place("megallm", tmp_path / "new")
    for _ in range(2):
        converted = convert(theirs, place, output)
    with open_folder(theirs.path) as weights, pytest.raises(ValueError, match=r"another model, iter_0000000: .* give"):
        write_native(place.path, replace(weights, iteration=3), overwrite=True)
    with pytest.raises(ValueError, match=r"holds iter_0000007, newer than iter_0000000: .* give another folder"):
        relayout(converted.path, run, LAYOUT)


def test_two_models_are_compared_tensor_by_tensor(tmp_path: Path, checkpoint: Path) -> None:
    ours, theirs = Place("megallm", checkpoint), Place("hf", tmp_path / "theirs")
    lines: list[str] = []
    assert not report_comparison(ours, theirs, lines.append)
    assert lines == ["0 of 21 tensors differ"]
    tensors = folders.read(theirs.path)
    tensors["model.norm.weight"][3] += 0.5
    tensors["model.layers.1.mlp.up_proj.weight"][2, 5] = torch.nan
    other = folders.write(tmp_path / "other", folders.LLAMA_CONFIG | {"rms_norm_eps": 1e-6}, tensors)
    lines.clear()
    assert report_comparison(ours, Place("hf", other), lines.append)
    assert lines == [
        "norm_epsilon is 1e-05 in one and 1e-06 in the other",
        "decoder.layers.1.mlp.up.weight: 1 element differs, at most by inf, at [2, 5]",
        "decoder.final_norm.weight: 1 element differs, at most by 5.000e-01, at [3]",
        "2 of 21 tensors differ",
    ]


def test_a_folder_that_a_job_has_is_left_to_it(checkpoint: Path) -> None:
    place = Place("megallm", checkpoint.parent)
    output = Output(None, LAYOUT, "local", overwrite=True, max_shard_bytes=10**9, weights_only=True)
    with own_folder(checkpoint.parent, print), pytest.raises(ValueError, match="is in use by another job, process"):
        convert(place, place, output)
    list(verify(checkpoint))
