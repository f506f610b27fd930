"""BERT's logits, losses and gradients equal those of transformers on the same weights, in one process and cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.layers.context import LayoutContext
from megallm.mesh import Mesh, MeshShape
from megallm.ops.cross_entropy import CrossEntropy
from megallm.parameter import description_of, piece_views
from megallm.train.engine import Engine, build_engine
from megallm.train.loss import LossTerm
from megallm.train.step import train_step
from megallm.train.tasks.bert import BERTTask
from tests.distributed.parity import Outcome, _boxes, assemble, masked_batch, micro_batches
from tests.distributed.pool import WorkerPool

pytest.importorskip("transformers")

VOCAB_SIZE, LENGTH, HIDDEN, LAYERS, HEADS, FFN, EPSILON, BATCH = 51, 16, 32, 3, 4, 48, 1e-12, 8
SETTINGS = {
    "model.architecture": "bert",
    "model.num_layers": LAYERS,
    "model.hidden_size": HIDDEN,
    "model.ffn_hidden_size": FFN,
    "model.num_attention_heads": HEADS,
    "model.max_position_embeddings": 20,
    "model.norm_epsilon": EPSILON,
    "model.vocab_size": VOCAB_SIZE,
    "model.apply_residual_connection_post_layernorm": True,
    "data.seq_length": LENGTH,
    "data.mock_data": True,
    "training.micro_batch_size": 2,
    "training.global_batch_size": BATCH,
    "training.train_iters": 10,
    "training.fp64": True,
    "optimizer.lr": 1e-3,
    "optimizer.clip_grad": 0.0,
}


@dataclass
class Run:
    """Weights and gradients by our names; words [sequence, batch, vocabulary], order [batch, 2]; the two losses."""

    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    words: np.ndarray
    order: np.ndarray
    losses: list[float]


def renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """transformers' tensors by our names: a norm at the end of a layer is the first one of the next."""
    parts = {
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.output",
        "attention.output.LayerNorm": "mlp_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
    }
    names = {
        "bert.embeddings.word_embeddings": "embedding.word",
        "bert.embeddings.position_embeddings": "embedding.position",
        "bert.embeddings.token_type_embeddings": "embedding.type",
        "bert.embeddings.LayerNorm": "encoder.layers.0.attention_norm",
        "bert.pooler.dense": "pooler",
        "cls.predictions.transform.dense": "head.transform",
        "cls.predictions.transform.LayerNorm": "head.norm",
        "cls.seq_relationship": "next_sentence",
        "cls.predictions": "output",
    }
    for layer in range(LAYERS):
        theirs, ours = f"bert.encoder.layer.{layer}", f"encoder.layers.{layer}"
        names |= {f"{theirs}.{part}": f"{ours}.{name}" for part, name in parts.items()}
        following = f"encoder.layers.{layer + 1}.attention_norm" if layer + 1 < LAYERS else "encoder.final_norm"
        names[f"{theirs}.output.LayerNorm"] = following
    found = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        found[f"{names[module]}.{suffix}"] = tensor.detach().numpy().copy()
    return found


def run_theirs(rank: int) -> Run:
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=20,
        layer_norm_eps=EPSILON,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = BertForPreTraining(config).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith("LayerNorm.weight")
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.15 * values + (1.0 if is_scale else 0.0))
    batch = masked_batch(0, BATCH, LENGTH, VOCAB_SIZE)
    outputs = model(
        input_ids=batch["tokens"],
        attention_mask=batch["padding_mask"],
        token_type_ids=batch["types"],
        labels=batch["labels"].masked_fill(batch["labels"] < 0, -100),
        next_sentence_label=batch["is_random"],
    )
    outputs.loss.backward()
    parameters = dict(model.named_parameters())
    words = outputs.prediction_logits.detach()
    # The losses apart; their sum is what was differentiated.
    found = torch.nn.functional.cross_entropy(words.flatten(0, 1), batch["labels"].flatten(), ignore_index=-1)
    order = outputs.seq_relationship_logits.detach()
    assert torch.allclose(found + torch.nn.functional.cross_entropy(order, batch["is_random"]), outputs.loss)
    return Run(
        renamed(parameters),
        renamed({name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}),
        words.transpose(0, 1).numpy().copy(),  # [batch, sequence, ..] -> [sequence, batch, ..]
        order.numpy().copy(),
        [float(found), float(outputs.loss.detach() - found)],
    )


class _KeepingTask(BERTTask):
    """Keeps copies of the logits, which the loss overwrites."""

    def __init__(self) -> None:
        super().__init__(CrossEntropy(VOCAB_SIZE), next_sentence=True)
        self.outputs: list[tuple[torch.Tensor, ...]] = []

    def loss_terms(self, outputs: tuple[torch.Tensor, ...], batch: Any, context: LayoutContext) -> list[LossTerm]:
        self.outputs.append(tuple(output.detach().clone() for output in outputs))
        return super().loss_terms(outputs, batch, context)


@torch.no_grad()
def load_weights(engine: Engine, weights: dict[str, np.ndarray]) -> None:
    """Copies this rank's boxes of the logical tensors into the engine. Their shapes must be the described ones."""
    for chunk in engine.chunks.values():
        for parameter in dict.fromkeys(chunk.parameters()):
            for piece, view in piece_views(parameter, description_of(parameter)):
                weight = weights[piece.name]
                assert weight.shape == piece.global_shape, f"{piece.name}: {weight.shape} for {piece.global_shape}"
                box = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.shape, strict=True))
                view.copy_(torch.from_numpy(weight[box]))


def run_ours(rank: int, tp: int, pp: int, weights: dict[str, np.ndarray]) -> tuple[Outcome, list[float], Any]:
    settings = SETTINGS | {
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
    }
    mesh = Mesh(MeshShape(tp=tp, pp=pp), rank, torch.device("cpu"))
    task = _KeepingTask()
    engine = build_engine(resolve(build(settings), tp * pp), task, mesh)
    load_weights(engine, weights)
    outcome = Outcome([], [], [], [], [])
    step_optimizer = engine.optimizer.step

    def keep_first(*arguments: Any) -> Any:
        outcome.gradients = _boxes(engine, lambda shard: shard.gradient)
        return step_optimizer(*arguments)

    engine.optimizer.step = keep_first  # type: ignore[method-assign]
    metrics = train_step(engine, micro_batches(engine, masked_batch(0, BATCH, LENGTH, VOCAB_SIZE)))
    words = order = None
    if task.outputs:
        words = torch.cat([words for words, _ in task.outputs], dim=1).numpy()
        order = torch.cat([order for _, order in task.outputs]).numpy()
    return outcome, metrics.losses.tolist(), (words, order)


@pytest.fixture(scope="module")
def theirs(pool: WorkerPool) -> Run:
    return pool.run(1, run_theirs)[0]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_same_weights_give_the_same_numbers(pool: WorkerPool, theirs: Run, tp: int, pp: int) -> None:
    ranks = pool.run(tp * pp, run_ours, tp, pp, theirs.weights)
    for _, losses, _ in ranks:
        assert losses == pytest.approx(theirs.losses, rel=1e-11)
    last = [outputs for _, _, outputs in ranks if outputs[0] is not None]
    words = np.concatenate([words for words, _ in last], axis=-1)[..., :VOCAB_SIZE]
    assert np.abs(words - theirs.words).max() <= 1e-11 * np.abs(theirs.words).max()
    for _, order in last:
        assert np.abs(order - theirs.order).max() <= 1e-11 * np.abs(theirs.order).max()
    gradients = assemble([outcome for outcome, _, _ in ranks], "gradients")
    assert gradients.keys() == theirs.gradients.keys()
    largest = max(float(np.abs(gradient).max()) for gradient in theirs.gradients.values())
    for name, wanted in theirs.gradients.items():
        # A key bias shifts all scores of a query alike: its true gradient is zero.
        scale = largest if name.endswith("key.bias") else float(np.abs(wanted).max())
        assert np.abs(gradients[name] - wanted).max() <= 1e-11 * scale, name
