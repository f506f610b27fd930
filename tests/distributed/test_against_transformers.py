"""Logits, losses, gradients and training steps equal those of the same models in the transformers library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from megallm.checkpoint.boxes import shard_boxes
from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.layers.context import LayoutContext
from megallm.mesh import Mesh, MeshShape
from megallm.model.word_loss import word_loss
from megallm.ops.cross_entropy import CrossEntropy
from megallm.train.engine import Engine, build_engine
from megallm.train.hugging_face import begin_with
from megallm.train.loss import LossTerm
from megallm.train.step import evaluate_step, train_step
from megallm.train.tasks.gpt import GPTTask
from tests.distributed.parity import Outcome, assemble, global_batch, micro_batches
from tests.distributed.pool import WorkerPool
from tests.distributed.transformers_weights import (
    MODELS,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    build_model,
    logical_tensors,
)

pytest.importorskip("transformers")

BATCH_SIZE = 8
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5

# Differences allowed, in parts of the largest value of a tensor.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-11}
TRAINED_LOSS_BOUND = 1e-10

# Ten steps where rounding is small enough to compare them, one elsewhere.
NUM_STEPS = {torch.float32: 1, torch.float64: 10}

EVERYWHERE = ("llama", "llama tied", "gpt2")
# Of the others, those in the fast tier.
QUICK = ("qwen 3", "gpt-neox")

# (tensor, pipeline) sizes. At tensor size 4 the two query groups of the Llama are fewer than the ranks.
LAYOUTS = {"one process": (1, 1), "tp 2": (2, 1), "tp 2, pp 2": (2, 2), "tp 4": (4, 1)}


@dataclass
class Run:
    """What a model did, with weights and gradients by our names.

    Logits [sequence, batch, vocabulary] and gradients are those of the first step.
    `evaluated` is the loss over a ragged mask before the first step.
    """

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    logits: np.ndarray | None = None
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    evaluated: float = 0.0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    final_weights: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class RankRun:
    """What one rank of our engine saw: its boxes, and if it holds the last stage its columns of the logits."""

    outcome: Outcome
    logits: np.ndarray | None
    evaluated: float


def batch_of_step(step: int) -> dict[str, torch.Tensor]:
    """Every second step counts tokens of four sequences only, of which one counts none."""
    return global_batch(step, BATCH_SIZE, SEQUENCE_LENGTH, VOCAB_SIZE, "ragged" if step % 2 else "full")


def run_theirs(rank: int, name: str, dtype: torch.dtype, folder: Path) -> Run:
    """The model in transformers, with torch's clipping and AdamW. Its first weights are left in a folder."""
    model = build_model(name, dtype)
    model.save_pretrained(folder)
    parameters = dict(model.named_parameters())
    run = Run(weights=logical_tensors(name, parameters))
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON)
    with torch.no_grad():
        run.evaluated = float(_their_loss(model, batch_of_step(1))[0])
    for step in range(NUM_STEPS[dtype]):
        optimizer.zero_grad()
        loss, logits = _their_loss(model, batch_of_step(step))
        loss.backward()
        if step == 0:
            run.logits = (
                logits.detach().transpose(0, 1).numpy().copy()
            )  # [batch, sequence, ..] -> [sequence, batch, ..]
            gradients = {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}
            run.gradients = logical_tensors(name, gradients)
        run.losses.append(float(loss.detach()))
        run.grad_norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM)))
        optimizer.step()
    run.final_weights = logical_tensors(name, parameters)
    return run


def _their_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the counting tokens, and the logits. Their own loss works in float32, so that it is taken here."""
    logits = model(input_ids=batch["tokens"], use_cache=False).logits
    losses = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["loss_mask"].flatten().to(losses.dtype)
    return (losses * mask).sum() / mask.sum(), logits


class _KeepingTask(GPTTask):
    """Keeps copies of the logits, which the loss overwrites."""

    def __init__(self, loss: CrossEntropy) -> None:
        super().__init__(loss)
        self.logits: list[torch.Tensor] = []

    def loss_terms(self, outputs: tuple[torch.Tensor, ...], batch: Any, context: LayoutContext) -> list[LossTerm]:
        self.logits.append(outputs[0].detach().clone())
        return super().loss_terms(outputs, batch, context)


def run_ours(rank: int, name: str, dtype: torch.dtype, tp: int, pp: int, folder: Path) -> RankRun:
    """The engine on this rank, begun with the model that transformers has saved."""
    settings = MODELS[name].settings | {
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
        "training.micro_batch_size": 2,
        "training.global_batch_size": BATCH_SIZE,
        "training.train_iters": 100,
        "training.fp64": dtype == torch.float64,
        "optimizer.lr": LEARNING_RATE,
        "optimizer.lr_decay_style": "constant",
        "optimizer.weight_decay": WEIGHT_DECAY,
        "optimizer.adam_beta1": BETAS[0],
        "optimizer.adam_beta2": BETAS[1],
        "optimizer.adam_eps": EPSILON,
        "optimizer.clip_grad": MAX_NORM,
    }
    mesh = Mesh(MeshShape(tp=tp, pp=pp), rank, torch.device("cpu"))
    config = resolve(build(settings), tp * pp)
    task = _KeepingTask(word_loss(config))
    engine = build_engine(config, task, mesh)
    begin_with(engine, str(folder))
    sums, counts = evaluate_step(engine, micro_batches(engine, batch_of_step(1)))
    task.logits.clear()
    outcome = Outcome([], [], [], [], _boxes(engine, "master"))
    step_optimizer = engine.optimizer.step

    def keep_first(*arguments: Any) -> Any:
        if not outcome.gradients:
            outcome.gradients = _boxes(engine, "gradient")
        return step_optimizer(*arguments)

    engine.optimizer.step = keep_first  # type: ignore[method-assign,assignment]
    for step in range(NUM_STEPS[dtype]):
        metrics = train_step(engine, micro_batches(engine, batch_of_step(step)))
        outcome.losses.append(float(metrics.losses[0]))
        outcome.grad_norms.append(float(metrics.grad_norm))
    outcome.weights = _boxes(engine, "master")
    logits = torch.cat(task.logits[: engine.num_micro_batches], dim=1).numpy() if task.logits else None
    return RankRun(outcome, logits, float(sums[0] / counts[0]))


def _boxes(engine: Engine, what: str) -> list[Any]:
    boxes = [box for shard in engine.optimizer.shards for box in shard_boxes("", shard, getattr(shard, what))]
    return [(box.name, box.global_shape, box.offset, box.tensor.numpy().copy(), box.saves) for box in boxes]


def whole_run(ranks: list[RankRun]) -> Run:
    """The ranks' boxes put together; `assemble` checks that replicas agree."""
    outcomes = [rank.outcome for rank in ranks]
    for outcome in outcomes:
        assert outcome.losses == outcomes[0].losses, "ranks report different losses"
    columns = [rank.logits for rank in ranks if rank.logits is not None]  # tensor ranks of the last stage, in order
    return Run(
        weights=assemble(outcomes, "initial_weights"),
        logits=np.concatenate(columns, axis=-1)[..., :VOCAB_SIZE],
        gradients=assemble(outcomes, "gradients"),
        evaluated=ranks[0].evaluated,
        losses=outcomes[0].losses,
        grad_norms=outcomes[0].grad_norms,
        final_weights=assemble(outcomes, "weights"),
    )


def difference(got: np.ndarray, want: np.ndarray, floor: float = 0.0) -> float:
    """Largest absolute difference in parts of the largest wanted value, or of `floor` where that is more."""
    assert got.shape == want.shape, f"{got.shape}, wanted {want.shape}"
    error = float(np.abs(got.astype(np.float64) - want).max())
    return error / max(float(np.abs(want).max()), floor) if np.isfinite(error) else np.inf


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


def folder_of(folders: Path, name: str, dtype: torch.dtype) -> Path:
    """Where a model is saved before its first step."""
    return folders / f"{name} {dtype}"


@pytest.fixture(scope="module")
def theirs(pool: WorkerPool, folders: Path) -> dict[tuple[str, torch.dtype], Run]:
    """Each model's run in transformers, made when first asked for."""

    class Known(dict[tuple[str, torch.dtype], Run]):
        def __missing__(self, key: tuple[str, torch.dtype]) -> Run:
            self[key] = pool.run(1, run_theirs, *key, folder_of(folders, *key))[0]
            return self[key]

    return Known()


def _cases() -> Iterator[Any]:
    """Every model in one process and cut in two, in float64; some in every layout and precision."""
    for name in MODELS:
        for dtype in BOUNDS:
            for layout in LAYOUTS:
                if name in EVERYWHERE:
                    is_quick = layout != "tp 4"
                elif dtype == torch.float64 and layout in ("one process", "tp 2"):
                    is_quick = name in QUICK and layout == "one process"
                else:
                    continue
                label = f"{name}, {str(dtype).removeprefix('torch.')}, {layout}"
                yield pytest.param(name, dtype, layout, id=label, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "layout"), list(_cases()))
def test_same_weights_give_the_same_numbers(
    pool: WorkerPool,
    theirs: dict[tuple[str, torch.dtype], Run],
    folders: Path,
    name: str,
    dtype: torch.dtype,
    layout: str,
) -> None:
    want = theirs[name, dtype]
    tp, pp = LAYOUTS[layout]
    got = whole_run(pool.run(tp * pp, run_ours, name, dtype, tp, pp, folder_of(folders, name, dtype)))
    bound = BOUNDS[dtype]

    assert got.weights.keys() == want.weights.keys()
    for key, weight in want.weights.items():
        assert np.array_equal(got.weights[key], weight), f"{key} was not loaded as it is"

    assert got.logits is not None
    assert want.logits is not None
    assert got.logits.dtype == want.logits.dtype
    assert difference(got.logits, want.logits) <= bound
    assert got.losses[0] == pytest.approx(want.losses[0], rel=bound)
    assert got.evaluated == pytest.approx(want.evaluated, rel=bound)

    assert got.gradients.keys() == want.gradients.keys()
    largest = max(float(np.abs(gradient).max()) for gradient in want.gradients.values())
    errors = {
        # A key bias shifts all scores of a query alike: its true gradient is zero, and what there is of it is rounding.
        key: difference(got.gradients[key], gradient, floor=largest if key.endswith("key.bias") else 0.0)
        for key, gradient in want.gradients.items()
    }
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] <= bound, f"gradient of {worst} differs by {errors[worst]:.2e} of its largest value"
    assert got.grad_norms[0] == pytest.approx(want.grad_norms[0], rel=bound)
    assert want.grad_norms[0] > MAX_NORM, "clipping is meant to be active"

    if dtype == torch.float64:
        assert got.losses == pytest.approx(want.losses, rel=TRAINED_LOSS_BOUND)
        assert got.grad_norms == pytest.approx(want.grad_norms, rel=TRAINED_LOSS_BOUND)
        for key, weight in want.final_weights.items():
            assert difference(got.final_weights[key], weight) <= TRAINED_LOSS_BOUND, f"{key} differs after training"


@pytest.mark.slow
def test_the_steps_move_the_model(theirs: dict[tuple[str, torch.dtype], Run]) -> None:
    """Agreement would mean little if nothing happened."""
    run = theirs["llama", torch.float64]
    assert len(run.losses) == NUM_STEPS[torch.float64]
    for key, weight in run.weights.items():
        assert np.abs(run.final_weights[key] - weight).max() > LEARNING_RATE, f"{key} has hardly moved"
    assert run.evaluated != pytest.approx(run.losses[0], rel=1e-3), "the ragged mask is meant to change the loss"
