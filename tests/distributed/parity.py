"""Trains one model in a layout and in one process, and compares everything that the layout must not change.

`python -m tests.distributed.parity` prints the table over all cases, with `--ops reference` that of plain torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
import torch

from megallm.checkpoint.boxes import LocalBox, shard_boxes
from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.config.report import counted
from megallm.mesh import Mesh, MeshShape
from megallm.train.engine import Engine, build_engine
from megallm.train.step import train_step
from megallm.train.tasks.bert import BERTTask
from megallm.train.tasks.gpt import GPTTask
from tests.distributed.pool import WorkerPool

# Bounds in float64: a gradient may differ by this much of its norm, or of a small part of the norm of all gradients,
# whichever is larger (the true gradient of a key bias is zero); a loss by this much of itself.
GRADIENT_BOUND = 1e-12
GRADIENT_FLOOR = 1e-5
LOSS_BOUND = 1e-12
NUM_STEPS = 20

_MODEL = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.vocab_size": 52,
    "model.init_method_std": 0.08,
    "data.seq_length": 16,
    "data.mock_data": True,
    "training.global_batch_size": 8,
    "training.train_iters": 100,
    "training.fp64": True,
    "optimizer.lr": 1e-3,
    "optimizer.lr_decay_style": "constant",
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 0.0,
}

GPT = {"model.position_embedding_type": "learned_absolute", "model.activation": "gelu"}
LLAMA = {
    "model.position_embedding_type": "rope",
    "model.normalization": "RMSNorm",
    "model.activation": "swiglu",
    "model.ffn_hidden_size": 48,
    "model.add_bias_linear": False,
    "model.tie_embeddings": False,
    "model.group_query_attention": True,
    "model.num_query_groups": 2,
}


@dataclass(frozen=True)
class Case:
    """A model and batch (`features`), and a layout of it. `kind` is "gpt" or "bert".

    On the device "cuda" all processes share one GPU.
    """

    name: str
    features: dict[str, Any]
    tp: int = 1
    pp: int = 1
    dp: int = 1
    layout: dict[str, Any] = field(default_factory=dict)
    mask: str = "full"
    delayed: bool = False
    num_steps: int = NUM_STEPS
    kind: str = "gpt"
    device: str = "cpu"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def settings(self) -> dict[str, Any]:
        axes = {
            "model.architecture": self.kind,
            "parallel.tensor_model_parallel_size": self.tp,
            "parallel.pipeline_model_parallel_size": self.pp,
            "parallel.sequence_parallel": True,
        }
        settings = _MODEL | self.features | axes | self.layout
        # Twice as many micro-batches as the pipeline has ranks: more would only take time.
        size, rest = divmod(settings["training.global_batch_size"], 2 * self.pp * self.dp)
        settings.setdefault("training.micro_batch_size", 1 if rest else max(size, 1))
        return settings

    def reference(self) -> Case:
        """The same model and batch in one process, all at once."""
        alone: dict[str, Any] = {"tp": 1, "pp": 1, "dp": 1, "layout": {"training.micro_batch_size": 8}}
        return replace(self, name="reference", delayed=False, **alone)


@dataclass
class Outcome:
    """What one rank saw. Boxes are (name, global shape, offset, values, whether this rank stands for them)."""

    losses: list[float]
    grad_norms: list[float]
    gradients: list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray, bool]]
    weights: list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray, bool]]
    initial_weights: list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray, bool]]


def global_batch(step: int, batch_size: int, length: int, vocab_size: int, mask: str) -> dict[str, torch.Tensor]:
    """The samples of a step, the same in every layout.

    Under "ragged", the eight sequences count 1, 3, 0 and 7 tokens, then none.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, vocab_size, (batch_size, length + 1), generator=generator)
    loss_mask = torch.ones(batch_size, length)
    if mask == "ragged":
        counts = torch.tensor([1, 3, 0, 7, 0, 0, 0, 0])
        loss_mask = (torch.arange(length) < counts.unsqueeze(1)).float()
    elif mask == "none":
        loss_mask = torch.zeros(batch_size, length)
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": loss_mask,
        "position_ids": torch.arange(length).expand(batch_size, length).contiguous(),
        "sample_ids": torch.arange(batch_size),
    }


def masked_batch(step: int, batch_size: int, length: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """The same for BERT: two texts each, of 5 tokens and more, then padding; a quarter of the tokens is to be found."""
    batch = global_batch(step, batch_size, length, vocab_size, "full")
    generator = torch.Generator().manual_seed(2000 + step)
    lengths = torch.randint(5, length + 1, (batch_size, 1), generator=generator)
    is_token = torch.arange(length) < lengths
    is_masked = is_token & (torch.rand(batch_size, length, generator=generator) < 0.25)
    return batch | {
        "types": (is_token & (torch.arange(length) >= 3)).long(),
        "padding_mask": is_token.long(),
        "loss_mask": is_masked.float(),
        "labels": batch["labels"].masked_fill(~is_masked, -1),
        "is_random": torch.randint(0, 2, (batch_size,), generator=generator),
    }


def micro_batches(engine: Engine, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """This data parallel rank's share, in Megatron's order."""
    size, dp = engine.config.training.micro_batch_size, engine.mesh.dp
    rows = [torch.arange(size) + (k * dp.size + dp.rank) * size for k in range(engine.num_micro_batches)]
    return [{name: tensor[row].to(engine.mesh.device) for name, tensor in batch.items()} for row in rows]


def make_engine(rank: int, case: Case) -> Engine:
    config = resolve(build(case.settings()), case.world_size)
    delay: Callable[[], float] | None = None
    if case.delayed:
        generator = Random(rank)
        delay = lambda: generator.choice((0.0, 0.002, 0.01))  # noqa: E731
    mesh = Mesh(MeshShape(tp=case.tp, pp=case.pp, dp=case.dp), rank, torch.device(case.device), delay=delay)
    make_task = BERTTask.from_config if case.kind == "bert" else GPTTask.from_config
    return build_engine(config, make_task(config), mesh)


def run_case(rank: int, case: Case, prepare: Callable[[Engine], None] | None = None) -> Outcome:
    """Trains on this rank. `prepare` may change the engine first: seeded bugs do."""
    engine = make_engine(rank, case)
    if prepare is not None:
        prepare(engine)
    outcome = Outcome([], [], [], [], _boxes(engine, lambda shard: shard.master))
    step = engine.optimizer.step

    def keep_gradients(*arguments: Any) -> Any:
        if not outcome.gradients:
            outcome.gradients = _boxes(engine, lambda shard: shard.gradient)
        return step(*arguments)

    engine.optimizer.step = keep_gradients  # type: ignore[method-assign]
    config = engine.config
    for number in range(case.num_steps):
        assert config.model.vocab_size and config.training.global_batch_size
        sizes = config.training.global_batch_size, config.data.seq_length, config.model.vocab_size
        batch = masked_batch(number, *sizes) if case.kind == "bert" else global_batch(number, *sizes, case.mask)
        metrics = train_step(engine, micro_batches(engine, batch))
        outcome.losses.append(float(metrics.losses.sum()))
        outcome.grad_norms.append(float(metrics.grad_norm))
    engine.reducer.finish_gather()
    outcome.weights = _boxes(engine, lambda shard: shard.master)
    engine.mesh.close()
    return outcome


def _boxes(engine: Engine, select: Callable[[Any], torch.Tensor]) -> list[Any]:
    boxes: list[LocalBox] = []
    for shard in engine.optimizer.shards:
        boxes += shard_boxes("", shard, select(shard))
    return [(box.name, box.global_shape, box.offset, box.tensor.numpy(force=True).copy(), box.saves) for box in boxes]


def assemble(outcomes: list[Outcome], what: str) -> dict[str, np.ndarray]:
    """Logical tensors from all ranks' boxes.

    Every element must be stood for exactly once, and replicas must agree bit for bit.
    """
    tensors: dict[str, np.ndarray] = {}
    holders: dict[str, np.ndarray] = {}
    boxes = [box for outcome in outcomes for box in getattr(outcome, what)]
    for name, shape, offset, values, counts in boxes:
        place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        if counts:
            tensors.setdefault(name, np.full(shape, np.nan))[place] = values
            holders.setdefault(name, np.zeros(shape, dtype=int))[place] += 1
    for name, count in holders.items():
        assert (count == 1).all(), f"elements of {name} are stood for {count.min()} to {count.max()} times"
    for name, _, offset, values, _ in boxes:
        place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        assert np.array_equal(tensors[name][place], values, equal_nan=True), f"replicas of {name} differ in {what}"
    return tensors


@dataclass
class Difference:
    """Worst figures of a case, in units in which 1 is the bound."""

    gradient: float
    gradient_name: str
    loss: float
    grad_norm: float
    weights: float
    initial_weights_equal: bool

    @property
    def passes(self) -> bool:
        figures = (self.gradient, self.loss, self.grad_norm)
        return all(figure <= 1.0 for figure in figures) and self.initial_weights_equal


def compare(reference: list[Outcome], outcomes: list[Outcome]) -> Difference:
    """How far a layout is from one process."""
    want, got = assemble(reference, "gradients"), assemble(outcomes, "gradients")
    assert want.keys() == got.keys(), f"tensors differ: {want.keys() ^ got.keys()}"
    everything = np.sqrt(sum(float((tensor**2).sum()) for tensor in want.values()))
    errors = {
        name: np.linalg.norm(got[name] - want[name])
        / (GRADIENT_BOUND * max(np.linalg.norm(want[name]), GRADIENT_FLOOR * everything, 1e-300))
        for name in want
    }
    worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
    for outcome in outcomes[1:]:
        assert outcome.losses == outcomes[0].losses, "ranks report different losses"
        assert outcome.grad_norms == outcomes[0].grad_norms, "ranks report different gradient norms"
    final, final_reference = assemble(outcomes, "weights"), assemble(reference, "weights")
    start, start_reference = assemble(outcomes, "initial_weights"), assemble(reference, "initial_weights")
    return Difference(
        gradient=float(errors[worst]),
        gradient_name=worst,
        loss=_relative(reference[0].losses, outcomes[0].losses) / LOSS_BOUND,
        grad_norm=_relative(reference[0].grad_norms[:1], outcomes[0].grad_norms[:1]) / GRADIENT_BOUND,
        weights=max(float(np.abs(final[name] - final_reference[name]).max()) for name in final),
        initial_weights_equal=all(np.array_equal(start[name], start_reference[name]) for name in start),
    )


def _relative(want: list[float], got: list[float]) -> float:
    """The largest relative difference; infinite where one of the two is not finite."""
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        difference = 0.0 if a == b else abs(b - a) / max(abs(a), 1e-300)
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
    return worst


class References:
    """One process's outcome for each set of features, computed once."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self._known: dict[str, list[Outcome]] = {}

    def of(self, case: Case) -> list[Outcome]:
        reference = case.reference()
        beside = (reference.mask, reference.num_steps, reference.kind, reference.device)
        key = repr((sorted(reference.settings().items()), beside))
        if key not in self._known:
            self._known[key] = self.pool.run(1, run_case, reference)
        return self._known[key]


def main() -> int:
    """Prints the table; the exit code tells whether every case passed."""
    from tests.distributed.parity_cases import CASES

    parser = argparse.ArgumentParser(description="Every layout against one process in float64, as a table.")
    parser.add_argument("words", nargs="*", help="only the cases whose names hold all of these")
    parser.add_argument("--ops", nargs="+", default=[], help="implementations of operators, as of a training run")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if all(word in case.name for word in arguments.words)]
    if not chosen:
        parser.error(f"none of the {len(CASES)} cases has {' and '.join(arguments.words)} in its name")
    pool = WorkerPool()
    references = References(pool)
    print(
        f"float64, {NUM_STEPS} AdamW steps, against one process. "
        f"1 is the bound: {GRADIENT_BOUND:g} for gradients and norms, {LOSS_BOUND:g} for losses."
    )
    print(
        f"{'case':58} {'tp':>2} {'pp':>2} {'dp':>2} {'gradient':>9} {'norm':>9} {'loss':>9} {'weights':>9} "
        f"{'seconds':>8}  worst gradient"
    )
    failed = 0
    for case in chosen:
        case = replace(case, features=case.features | {"training.ops": arguments.ops})
        begin = time.monotonic()
        difference = compare(references.of(case), pool.run(case.world_size, run_case, case))
        failed += not difference.passes
        print(
            f"{case.name:58} {case.tp:2} {case.pp:2} {case.dp:2} {difference.gradient:9.2e} "
            f"{difference.grad_norm:9.2e} {difference.loss:9.2e} {difference.weights:9.2e} "
            f"{time.monotonic() - begin:8.1f}  {difference.gradient_name}"
            f"{'' if difference.passes else '   FAILED'}",
            flush=True,
        )
    print(f"{counted(len(chosen), 'case')}, {failed} failed")
    pool.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
