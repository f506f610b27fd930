"""Which additions of hidden states a stage makes by themselves: those that no norm and no dropout can make."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from megallm.communication import Group, Transport
from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.layers.context import LayoutContext
from megallm.model.gpt import GPTStage
from megallm.ops.library import NATIVE

LAYERS = 3
SETTINGS = {
    "model.num_layers": LAYERS,
    "model.hidden_size": 16,
    "model.num_attention_heads": 2,
    "model.add_bias_linear": False,
    "model.position_embedding_type": "none",
    "model.vocab_size": 32,
    "data.seq_length": 8,
    "training.micro_batch_size": 2,
}


def additions(output: torch.Tensor) -> tuple[int, int]:
    """How many additions the forward pass made by themselves, and how many autograd will: where a result went to
    several places, their gradients are summed.
    """
    used: Counter[tuple[Any, int]] = Counter()
    found, waiting = {output.grad_fn}, [output.grad_fn]
    while waiting:
        for edge in waiting.pop().next_functions:
            used[edge] += 1
            if edge[0] is not None and edge[0] not in found:
                found.add(edge[0])
                waiting.append(edge[0])
    sums = sum(uses - 1 for (node, _), uses in used.items() if node is not None)
    return sum(node.name() == "AddBackward0" for node in found), sums


@pytest.mark.skipif(not NATIVE.in_use, reason="in plain torch every addition is one by itself")
@pytest.mark.parametrize(
    ("settings", "forward", "backward"),
    [
        # What leaves the stage is one tensor.
        ({}, 1, 0),
        ({"model.hidden_dropout": 0.1}, 0, 0),
        # Attention's and the MLP's are added to one residual.
        ({"model.parallel_residual": True}, LAYERS + 1, 0),
        # Attention and the MLP each share their input with the residual, behind a norm.
        ({"model.apply_residual_connection_post_layernorm": True}, 1, 2 * LAYERS),
    ],
    ids=str,
)
def test_additions_of_a_stage(settings: dict[str, Any], forward: int, backward: int) -> None:
    config = resolve(build(SETTINGS | settings), 1)
    context = LayoutContext(Group((0,), 0, Transport(None)), False, torch.float32, torch.device("cpu"), seed=1)
    stage = GPTStage(config, range(LAYERS), context, is_first=False, is_last=False)
    stage.initialize()
    batch = {"tokens": torch.zeros(2, 8, dtype=torch.int64), "sample_ids": torch.arange(2)}
    (output,) = stage((torch.randn(8, 2, 16, requires_grad=True),), batch, torch.tensor(1))
    assert additions(output) == (forward, backward)
