"""Which checkpoint is taken up, and what is refused: with the same sentence on every rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megallm.checkpoint.commit import TRACKER
from megallm.checkpoint.load import find_checkpoints
from megallm.checkpoint.manifest import MANIFEST, digest, read_manifest
from megallm.train.resume import load_engine, load_weights
from megallm.train.saving import save_engine
from tests.distributed.checkpoint_runs import UNTIED, SavedRuns
from tests.distributed.parity import Case, make_engine
from tests.distributed.parity_cases import SHARDED, TWO_PER_MICRO_BATCH
from tests.distributed.pool import WorkerPool

SOURCE = Case("tensor 2", UNTIED, tp=2, layout=TWO_PER_MICRO_BATCH)


def try_to_load(rank: int, case: Case, root: str) -> str:
    """The sentence with which loading is refused. The ranks must still be in step afterwards."""
    engine = make_engine(rank, case)
    try:
        load_engine(engine, root)
    except ValueError as error:
        engine.mesh.world.barrier()
        return str(error)
    return ""


def _remove_a_file(folder: Path) -> None:
    (folder / "rank_00001.safetensors").unlink()


def _cut_a_file_short(folder: Path) -> None:
    file = folder / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _fill_a_file_with_nonsense(folder: Path) -> None:
    file = folder / "rank_00001.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)


def _flip_a_bit(folder: Path) -> None:
    file = folder / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def _rewrite_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Somebody changes the manifest and makes its checksum right."""

    def rewrite(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["digest"]
        changed = change(manifest)
        text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        if isinstance(changed, dict):
            changed["digest"] = digest(text.encode())
        (folder / MANIFEST).write_text(json.dumps(changed))

    return rewrite


def _without(*path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def remove(manifest: dict[str, Any]) -> dict[str, Any]:
        place = manifest
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        return manifest

    return remove


def _without_last_box(manifest: dict[str, Any]) -> dict[str, Any]:
    manifest["tensors"]["first_moment/decoder.layers.3.mlp.down.weight"]["boxes"].pop()
    return manifest


def _break_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


# A layer that only the second of two pipeline ranks holds: the first one finds nothing wrong.
LATE_NORM = "decoder.layers.6.attention_norm.weight"

DAMAGES = {
    "missing file": (_remove_a_file, "rank_00001.safetensors cannot be opened: No such file"),
    "short file": (_cut_a_file_short, "rank_00000.safetensors has "),
    "nonsense file": (_fill_a_file_with_nonsense, "rank_00001.safetensors is damaged between bytes"),
    "flipped bit": (_flip_a_bit, "rank_00001.safetensors is damaged between bytes"),
    "missing tensor": (
        _rewrite_manifest(_without("tensors", f"weights/{LATE_NORM}")),
        f"holds no weights of {LATE_NORM}",
    ),
    "missing part": (_rewrite_manifest(_without_last_box), "elements of first_moment/decoder.layers.3.mlp.down.weight"),
    "missing moment": (
        _rewrite_manifest(_without("tensors", "second_moment/output.weight")),
        "holds no second_moment of output.weight",
    ),
    "half a manifest": (_break_manifest, "manifest.json cannot be read"),
    "manifest of another format": (_rewrite_manifest(lambda it: it | {"format": "other"}), "has format 'other'"),
    "manifest that is a list": (_rewrite_manifest(lambda it: [it]), "has format None"),
    "manifest without progress": (_rewrite_manifest(_without("state", "position")), "lacks position, or has nonsense"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_all_ranks_alike(
    pool: WorkerPool, saved_runs: SavedRuns, tmp_path: Path, damage: str
) -> None:
    root, _ = saved_runs.of(SOURCE)
    shutil.copytree(root, tmp_path / "copy")
    spoil, wanted = DAMAGES[damage]
    (folder,) = find_checkpoints(str(tmp_path / "copy"))
    spoil(folder)
    first, second = pool.run(2, try_to_load, Case("", UNTIED, pp=2), str(tmp_path / "copy"))
    assert first == second
    assert wanted in first
    assert "\n" not in first


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model.hidden_size": 64}, "hidden_size is 32 there and 64 here"),
        ({"model.num_layers": 2}, "num_layers is 7 there and 2 here"),
        ({"model.num_layers": 6}, "num_layers is 7 there and 6 here"),
        ({"model.vocab_size": 52}, "vocab_size is 51 there and 52 here"),
        ({"model.activation": "geglu"}, "activation is 'swiglu' there and 'geglu' here"),
        ({"model.tie_embeddings": True}, "tie_embeddings is False there and True here"),
    ],
)
def test_another_model_is_refused(pool: WorkerPool, saved_runs: SavedRuns, change: dict[str, Any], wanted: str) -> None:
    root, _ = saved_runs.of(SOURCE)
    first, second = pool.run(2, try_to_load, Case("", UNTIED | change, pp=2), root)
    assert first == second
    assert wanted in first


def test_ranks_that_see_different_folders_are_stopped(pool: WorkerPool, saved_runs: SavedRuns, tmp_path: Path) -> None:
    root, _ = saved_runs.of(SOURCE)
    first, second = pool.run(2, _load_from_own_folder, Case("", UNTIED, pp=2), [root, str(tmp_path)])
    assert "checkpoint of iteration 3 there and others none" in first
    assert "checkpoint of iteration 3 there and others none" in second


def _load_from_own_folder(rank: int, case: Case, roots: list[str]) -> str:
    return try_to_load(rank, case, roots[rank])


def test_an_empty_folder_starts_afresh(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(2, _load_nothing, Case("", UNTIED, pp=2), str(tmp_path)) == [(True, 0)] * 2
    assert pool.run(2, _load_nothing, Case("", UNTIED, pp=2), str(tmp_path / "absent")) == [(True, 0)] * 2


def _load_nothing(rank: int, case: Case, root: str) -> tuple[bool, int]:
    engine = make_engine(rank, case)
    return load_engine(engine, root) is None, engine.progress.iteration


def test_weights_of_a_folder_that_is_no_checkpoint_are_refused(pool: WorkerPool, tmp_path: Path) -> None:
    first, second = pool.run(2, _load_weights_of, Case("", UNTIED, pp=2), tmp_path)
    assert first == second
    assert "manifest.json cannot be read" in first


def _load_weights_of(rank: int, case: Case, folder: Path) -> str:
    engine = make_engine(rank, case)
    with pytest.raises(ValueError) as caught:
        load_weights(engine, folder)
    return str(caught.value)


# Whole or absent


def _make_folder(root: Path, name: str) -> None:
    (root / name).mkdir(parents=True)
    (root / name / MANIFEST).write_text("{}")


def test_the_newest_committed_folder_is_picked(tmp_path: Path) -> None:
    _make_folder(tmp_path, "iter_0000009.0123456789abcdef.tmp")
    assert find_checkpoints(str(tmp_path)) == []
    _make_folder(tmp_path, "iter_0000003")
    _make_folder(tmp_path, "iter_10000000")
    (tmp_path / TRACKER).write_text("3\n")
    newest_first = [tmp_path / "iter_10000000", tmp_path / "iter_0000003"]
    assert find_checkpoints(str(tmp_path)) == newest_first
    assert find_checkpoints(str(tmp_path), 3) == newest_first[1:]
    assert find_checkpoints(str(tmp_path / "iter_0000003")) == newest_first[1:]
    with pytest.raises(ValueError, match=r"iter_0000004 is not there.*there are 3, 10000000"):
        find_checkpoints(str(tmp_path), 4)


def test_one_that_stepped_aside_counts_until_its_successor_is_there(tmp_path: Path) -> None:
    _make_folder(tmp_path, "iter_0000003.replaced")
    assert find_checkpoints(str(tmp_path)) == [tmp_path / "iter_0000003.replaced"]
    _make_folder(tmp_path, "iter_0000003")
    assert find_checkpoints(str(tmp_path)) == [tmp_path / "iter_0000003"]


def test_what_is_damaged_is_not_taken_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "iter_0000008").mkdir()
    with pytest.raises(ValueError, match=r"iter_0000008 has no manifest\.json"):
        find_checkpoints(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        find_checkpoints(str(tmp_path / "file"))


def test_the_newest_without_its_manifest_is_damaged_and_stays(tmp_path: Path) -> None:
    engine = make_engine(0, Case("", UNTIED))
    engine.progress.iteration = 2
    save_engine(engine, str(tmp_path))
    torn = tmp_path / "iter_0000005"
    torn.mkdir()
    (torn / "somebody's").write_text("work")
    with pytest.raises(ValueError, match=r"iter_0000005.*manifest\.json"):
        load_engine(engine, str(tmp_path))
    engine.progress.iteration = 5
    save_engine(engine, str(tmp_path))
    assert find_checkpoints(str(tmp_path)) == [torn, tmp_path / "iter_0000002"]
    (aside,) = tmp_path.glob("iter_0000005.*.not_ours")
    assert (aside / "somebody's").read_text() == "work"


def test_the_tracker_is_a_hint(tmp_path: Path) -> None:
    engine = make_engine(0, Case("", UNTIED))
    for iteration in (2, 5):
        engine.progress.iteration = iteration
        save_engine(engine, str(tmp_path))
    for text, is_noted in (("2", True), ("5", False), ("77", False), ("foo", False), ("", False)):
        (tmp_path / TRACKER).write_text(text)
        loaded = load_engine(engine, str(tmp_path))
        assert loaded is not None
        assert loaded.folder == tmp_path / "iter_0000005"
        assert any("--ckpt-step 2" in note for note in loaded.notes) == is_noted, text


def test_an_earlier_checkpoint_is_loaded_when_asked_for(tmp_path: Path) -> None:
    engine = make_engine(0, Case("", UNTIED))
    for iteration in (2, 5):
        engine.progress.iteration = iteration
        save_engine(engine, str(tmp_path))
    engine = make_engine(0, Case("", UNTIED | {"checkpoint.ckpt_step": 2}))
    loaded = load_engine(engine, str(tmp_path))
    assert loaded is not None
    assert loaded.folder == tmp_path / "iter_0000002"
    assert engine.progress.iteration == 2


def test_a_damaged_one_is_named_and_the_one_before_taken_when_allowed(pool: WorkerPool, tmp_path: Path) -> None:
    case = Case("", UNTIED, dp=2, layout=SHARDED)
    pool.run(2, _save_twice, case, str(tmp_path))
    _flip_a_bit(tmp_path / "iter_0000005")
    for said in pool.run(2, try_to_load, case, str(tmp_path)):
        assert "rank_00001.safetensors is damaged" in said
        assert "--allow-fallback continues from iter_0000002" in said
    allowed = replace(case, features=UNTIED | {"checkpoint.allow_fallback": True})
    for folder, iteration, notes in pool.run(2, _load_and_tell, allowed, str(tmp_path)):
        assert (folder, iteration) == ("iter_0000002", 2)
        assert "rank_00001.safetensors is damaged" in notes[0]
        assert "Going back to iter_0000002" in notes[0]
    _flip_a_bit(tmp_path / "iter_0000002")
    for said in pool.run(2, try_to_load, allowed, str(tmp_path)):
        assert "iter_0000002/rank_00001.safetensors is damaged" in said


def _save_twice(rank: int, case: Case, root: str) -> None:
    engine = make_engine(rank, case)
    for iteration in (2, 5):
        engine.progress.iteration = iteration
        save_engine(engine, root)


def _load_and_tell(rank: int, case: Case, root: str) -> tuple[str, int, list[str]]:
    engine = make_engine(rank, case)
    loaded = load_engine(engine, root)
    assert loaded is not None
    return loaded.folder.name, engine.progress.iteration, loaded.notes


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    engine = make_engine(0, Case("", UNTIED))
    save_engine(engine, str(tmp_path))
    engine.progress.consumed_valid_samples = 64
    folder = save_engine(engine, str(tmp_path)).folder
    assert read_manifest(folder).state["consumed_valid_samples"] == 64
    assert sorted(file.name for file in folder.iterdir()) == [MANIFEST, "rank_00000.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_0000000", TRACKER]
