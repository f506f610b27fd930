"""A checkpoint saved under one layout is taken up under any other: the same state bit for bit, and the run goes on as
if it had never stopped. Each rank reads only what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megallm.checkpoint.boxes import LocalBox, local_boxes, weight_boxes
from megallm.checkpoint.load import find_checkpoints
from megallm.checkpoint.manifest import CHUNK_BYTES, MANIFEST, Manifest, read_manifest
from megallm.layers.embedding import padded_vocab_size
from megallm.train.resume import load_engine
from megallm.train.saving import save_engine
from tests.distributed.checkpoint_runs import BATCH, BF16, TIED, UNTIED, SavedRuns, load_and_train
from tests.distributed.parity import LLAMA, LOSS_BOUND, Case, assemble, make_engine
from tests.distributed.parity_cases import (
    FOUR_PER_MICRO_BATCH,
    NO_SEQUENCE_PARALLEL,
    OVERLAPPED,
    OVERLAPPED_ALL_REDUCE,
    SHARDED,
    TWO_PER_MICRO_BATCH,
    TWO_STAGES,
)
from tests.distributed.pool import WorkerPool

UNPADDED = {"model.make_vocab_size_divisible_by": 1}
LITTLE_PADDED = {"model.make_vocab_size_divisible_by": 8}
HUB = "tensor 2 data 2 sharded"
LAYOUTS = {
    case.name: case
    for case in (
        Case("one process", {}, layout=UNPADDED),
        Case("data 2", {}, dp=2),
        Case("data 2 sharded", {}, dp=2, layout=SHARDED),
        Case("tensor 2", {}, tp=2, layout=TWO_PER_MICRO_BATCH),
        Case("tensor 2, no sequence parallelism", {}, tp=2, layout=NO_SEQUENCE_PARALLEL | UNPADDED),
        Case("pipeline 3", {}, pp=3, layout=LITTLE_PADDED),
        Case(HUB, {}, tp=2, dp=2, layout=SHARDED | LITTLE_PADDED),
        Case("tensor 2 pipeline 2", {}, tp=2, pp=2, layout=TWO_PER_MICRO_BATCH),
        Case("tensor 4, fewer groups than ranks", {}, tp=4, layout=FOUR_PER_MICRO_BATCH | UNPADDED),
        Case("pipeline 2 data 2 sharded", {}, pp=2, dp=2, layout=SHARDED),
        Case("interleaved 2 data 2", {}, pp=2, dp=2, layout=OVERLAPPED_ALL_REDUCE | TWO_STAGES),
        Case("data 4 sharded", {}, dp=4, layout=SHARDED),
        Case("pipeline 5", {}, pp=5),
        Case("tensor 2 pipeline 3", {}, tp=2, pp=3, layout=UNPADDED),
        Case("pipeline 7", {}, pp=7, layout=UNPADDED),
        Case("all axes, interleaved, sharded", {}, tp=2, pp=2, dp=2, layout=OVERLAPPED | TWO_STAGES),
        Case("pipeline 4 data 2", {}, pp=4, dp=2),
        Case("tensor 4 pipeline 2", {}, tp=4, pp=2, layout=FOUR_PER_MICRO_BATCH),
        Case("data 8 sharded", {}, dp=8, layout=SHARDED | UNPADDED),
    )
}
# Who saves, and who besides the hub takes it up.
MATRIX = [
    (TIED, "one process", ["interleaved 2 data 2", "data 8 sharded"]),
    (TIED, "data 2 sharded", ["one process", "pipeline 3"]),
    (TIED, "pipeline 3", ["tensor 2 pipeline 2", "data 4 sharded"]),
    (TIED, "tensor 2 pipeline 2", ["data 2", "pipeline 2 data 2 sharded"]),
    (TIED, "interleaved 2 data 2", ["tensor 2, no sequence parallelism", "one process"]),
    (TIED, "all axes, interleaved, sharded", ["pipeline 4 data 2", "data 4 sharded"]),
    (UNTIED, "tensor 4, fewer groups than ranks", ["one process", "pipeline 7"]),
    (UNTIED, "data 4 sharded", ["tensor 4, fewer groups than ranks", "interleaved 2 data 2"]),
    (UNTIED, "pipeline 5", ["tensor 2 pipeline 3", "data 2 sharded"]),
    (UNTIED, "tensor 2 pipeline 3", ["pipeline 5", "tensor 4 pipeline 2"]),
    (UNTIED, "pipeline 7", ["all axes, interleaved, sharded", "tensor 2"]),
    (BF16, "pipeline 2 data 2 sharded", ["tensor 2", "all axes, interleaved, sharded"]),
]
QUICK = [
    (TIED, "data 2 sharded", "one process"),
    (UNTIED, "data 4 sharded", "interleaved 2 data 2"),
    (UNTIED, "tensor 4, fewer groups than ranks", HUB),
]
FAMILIES = {"tied": TIED, "untied": UNTIED, "bf16": BF16}


def case_of(features: dict[str, Any], layout: str) -> Case:
    return replace(LAYOUTS[layout], features=features)


def pairs() -> list[Any]:
    """(the case that saves, the case that loads)"""
    found = []
    for features, source, others in MATRIX:
        family = next(name for name, it in FAMILIES.items() if it is features)
        for target in (HUB, *others):
            marks = () if (features, source, target) in QUICK else (pytest.mark.slow,)
            cases = case_of(features, source), case_of(features, target)
            found.append(pytest.param(*cases, id=f"{family}, {source} to {target}", marks=marks))
    return found


DIMENSIONS: dict[str, Callable[[Case], object]] = {
    "tensor": lambda case: case.tp,
    "pipeline": lambda case: case.pp,
    "virtual": lambda case: "parallel.num_virtual_stages_per_pipeline_rank" in case.layout,
    "data": lambda case: case.dp,
    "world": lambda case: case.world_size,
    "distributed optimizer": lambda case: "parallel.use_distributed_optimizer" in case.layout,
    "rows of the embedding": lambda case: padded_vocab_size(
        51, case.layout.get("model.make_vocab_size_divisible_by", 128), case.tp
    ),
}


def test_the_matrix_varies_every_dimension() -> None:
    assert len(MATRIX) == 12
    cases = [pair.values for pair in pairs()]
    for _, source, others in MATRIX:
        assert len({source, HUB, *others}) == 4
    assert {case.world_size for pair in cases for case in pair} == set(range(1, 9))
    for name, value in DIMENSIONS.items():
        for side in (0, 1):
            assert len({value(pair[side]) for pair in cases}) > 1, f"{name} is the same in all"
        for features in (TIED, UNTIED):
            changes = {(value(saves), value(loads)) for saves, loads in cases if saves.features is features}
            assert any(before != after for before, after in changes), f"{name} never changes on the way"


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), pairs())
def test_another_layout_goes_on(pool: WorkerPool, saved_runs: SavedRuns, source: Case, target: Case) -> None:
    root, wanted = saved_runs.of(source)
    logs = pool.run(target.world_size, load_and_train, target, root, timeout=300.0)
    assert_same_state(assemble(wanted, "at_checkpoint"), assemble(logs, "at_checkpoint"))
    bound = LOSS_BOUND if source.settings()["training.fp64"] else 2e-2
    for log in logs:
        assert log.progress == wanted[0].progress == (3, 3 * BATCH, 5 * BATCH, 2.0 * BATCH, 2.0, 2.0)
        assert log.losses == pytest.approx(wanted[0].losses, rel=bound, abs=0.0)


def assert_same_state(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    assert {name.partition("/")[0] for name in before} == {"weights", "first_moment", "second_moment"}
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), f"{name} changed on its way"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case_of(features, source), id=f"{name}, {source}", marks=marks)
        for name, source, marks in (
            ("tied", "data 2 sharded", ()),
            ("untied", "tensor 4, fewer groups than ranks", pytest.mark.slow),
            ("tied", "all axes, interleaved, sharded", pytest.mark.slow),
            ("bf16", "pipeline 2 data 2 sharded", pytest.mark.slow),
        )
        for features in (FAMILIES[name],)
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(pool: WorkerPool, saved_runs: SavedRuns, case: Case) -> None:
    root, wanted = saved_runs.of(case)
    logs = pool.run(case.world_size, load_and_train, case, root, timeout=300.0)
    for log, want in zip(logs, wanted, strict=True):
        assert log.losses == want.losses
        for (name, *place, values, _), (*_, original, _) in zip(log.at_end, want.at_end, strict=True):
            assert values.tobytes() == original.tobytes(), f"{name} at {place} differs"


FP32 = UNTIED | {"training.fp64": False}
PRECISIONS = {
    "bf16": BF16,
    # From where the scale starts otherwise, the first steps overflow and are skipped.
    "fp16": FP32 | {"training.fp16": True, "training.initial_loss_scale": 1024.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_precision_takes_up_the_same_numbers(
    pool: WorkerPool, saved_runs: SavedRuns, tmp_path: Path, precision: str
) -> None:
    """From float32 and back: the optimizer's weights and moments stay, the model's weights are rounded once."""
    root, wanted = saved_runs.of(case_of(FP32, "pipeline 2 data 2 sharded"))
    rounded = case_of(PRECISIONS[precision], "tensor 2")
    logs = pool.run(2, load_and_train, rounded, root)
    before = assemble(wanted, "at_checkpoint")
    assert_same_state(before, assemble(logs, "at_checkpoint"))
    assert logs[0].losses == pytest.approx(wanted[0].losses, rel=2e-2)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    models = assemble(pool.run(2, load_and_save, rounded, root, str(tmp_path)), "in_model")
    for name, values in models.items():
        assert np.array_equal(values, torch.from_numpy(before[name]).to(dtype).double().numpy()), name
    assert models.keys() == {name for name in before if name.startswith("weights/")}
    logs = pool.run(4, load_and_train, case_of(FP32, "pipeline 2 data 2 sharded"), str(tmp_path))
    assert_same_state(before, assemble(logs, "at_checkpoint"))
    assert [log.losses for log in logs] == [log.losses for log in wanted]


@dataclass
class Weights:
    """A rank's weights as its model holds them, in boxes as `assemble` takes them."""

    in_model: list[Any]


def load_and_save(rank: int, case: Case, root: str, target: str) -> Weights:
    """Gives the model's weights of one checkpoint, and makes another of it."""
    engine = make_engine(rank, case)
    assert load_engine(engine, root) is not None
    save_engine(engine, target)
    return Weights(
        [
            (f"{box.kind}/{box.name}", box.global_shape, box.offset, box.tensor.double().numpy(), box.saves)
            for box in weight_boxes(engine.chunks, engine.mesh)
        ]
    )


def test_vocabulary_is_saved_at_its_true_size(saved_runs: SavedRuns) -> None:
    root, _ = saved_runs.of(case_of(TIED, "data 2 sharded"))
    (folder,) = find_checkpoints(root)
    ends = [
        int(key.rsplit("@", 1)[1].split(",")[0]) + tensor.shape[0]
        for file in folder.glob("*.safetensors")
        for key, tensor in load_file(file).items()
        if key.startswith("weights/embedding.word.weight@")
    ]
    assert max(ends) == 51


# Only what is needed is read. The tensors here have several chunks.

LARGE = LLAMA | {
    "model.hidden_size": 256,
    "model.ffn_hidden_size": 1024,
    "model.num_layers": 2,
    "model.vocab_size": 8000,
}


def save_untrained(rank: int, case: Case, root: str) -> None:
    save_engine(make_engine(rank, case), root)


def load_and_count(rank: int, case: Case, root: str) -> tuple[int, int, int]:
    """Bytes that this process read while it loaded, bytes that the rules allow, and bytes of its tensors."""
    engine = make_engine(rank, case)
    boxes = list(local_boxes(engine.optimizer, engine.chunks, engine.mesh))
    (folder,) = find_checkpoints(root)
    manifest = read_manifest(folder)
    begin = _bytes_read()
    assert load_engine(engine, root) is not None
    read = _bytes_read() - begin
    own_files = manifest.files[rank :: case.world_size]
    besides = (folder / MANIFEST).stat().st_size + sum(file.data_begin for file in own_files)
    allowed = besides + sum(_allowed(box, manifest) for box in boxes)
    return read, allowed, besides + sum(box.tensor.nbytes for box in boxes)


def _bytes_read() -> int:
    """What the kernel counted for this process."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _allowed(box: LocalBox, manifest: Manifest) -> int:
    """The rows of each saved box that hold some of `box`, and up to a chunk more at both ends."""
    total = 0
    for saved in manifest.tensors[f"{box.kind}/{box.name}"].boxes:
        shared = [
            min(a + n, b + m) - max(a, b)
            for a, n, b, m in zip(box.offset, box.tensor.shape, saved.offset, saved.shape, strict=True)
        ]
        if min(shared) > 0:
            rows = shared[0] * (saved.num_bytes // saved.shape[0])
            total += min(saved.num_bytes, rows + 2 * CHUNK_BYTES)
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count what a process reads")
@pytest.mark.parametrize(
    ("source", "target", "most"),
    [
        ("one process", "data 4 sharded", 1.4),
        ("one process", "pipeline 2 data 2 sharded", 1.3),
        ("data 4 sharded", HUB, 2.2),
        ("tensor 2", "all axes, interleaved, sharded", 2.2),
    ],
)
def test_each_rank_reads_only_what_it_needs(
    pool: WorkerPool, tmp_path: Path, source: str, target: str, most: float
) -> None:
    """`most`: how much of its own tensors' bytes a rank reads; of columns it must read the whole rows."""
    saving, loading = case_of(LARGE, source), case_of(LARGE, target)
    pool.run(saving.world_size, save_untrained, saving, str(tmp_path))
    (folder,) = find_checkpoints(str(tmp_path))
    whole = sum(file.num_bytes for file in read_manifest(folder).files)
    for rank, (read, allowed, own) in enumerate(pool.run(loading.world_size, load_and_count, loading, str(tmp_path))):
        # Messages between the ranks are counted as well.
        assert read <= allowed + 100_000, f"rank {rank} read {read} bytes and may read {allowed}"
        assert read <= most * own, f"rank {rank} read {read} bytes for {own}"
        assert read < whole / 1.5
