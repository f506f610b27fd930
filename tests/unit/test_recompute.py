"""Recomputation keeps less and changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallm.communication import Group, Transport
from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.config.tree import TrainingConfig
from megallm.layers.context import LayoutContext
from megallm.model.gpt import GPTStage
from megallm.model.stack import runs_of_layers

SETTINGS = {
    "model.num_layers": 5,
    "model.hidden_size": 16,
    "model.num_attention_heads": 2,
    "model.activation": "swiglu",
    "model.ffn_hidden_size": 64,
    "model.attention_dropout": 0.1,
    "model.vocab_size": 32,
    "data.seq_length": 24,
    "training.micro_batch_size": 1,
}

# With dropout a layer makes its sums itself; without it leaves the last one to the next layer.
DROPOUT = [0.2, 0.0]

FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}


def gradients(hidden_dropout: float = 0.2, **training: Any) -> tuple[list[torch.Tensor], int]:
    """Gradients of all parameters, and the bytes that the forward pass kept for them."""
    settings = SETTINGS | {"model.hidden_dropout": hidden_dropout}
    config = resolve(build(settings | {f"training.{name}": value for name, value in training.items()}), 1)
    context = LayoutContext(Group((0,), 0, Transport(None)), False, torch.float32, torch.device("cpu"), seed=1)
    stage = GPTStage(config, range(5), context, is_first=True, is_last=True)
    stage.initialize()
    tokens = torch.randint(0, 32, (3, 24), generator=torch.Generator().manual_seed(2))
    batch = {"tokens": tokens, "position_ids": torch.arange(24).expand(3, 24), "sample_ids": torch.arange(3)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (logits,) = stage((), batch, torch.tensor(7))
    logits.square().sum().backward()
    found = [parameter.grad for parameter in stage.parameters()]
    assert all(gradient is not None and gradient.any() for gradient in found)
    return found, sum(kept.values())  # type: ignore[return-value]


@pytest.fixture(scope="module")
def plain() -> dict[float, tuple[list[torch.Tensor], int]]:
    return {dropout: gradients(dropout) for dropout in DROPOUT}


@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize(
    "settings",
    [
        FULL,
        FULL | {"recompute_num_layers": 2},
        FULL | {"recompute_num_layers": 9},
        FULL | {"recompute_method": "block", "recompute_num_layers": 2},
        SELECTIVE,
        SELECTIVE | {"recompute_modules": ["mlp"]},
        SELECTIVE | {"recompute_modules": ["core_attn", "mlp"]},
    ],
    ids=str,
)
def test_gradients_keep_every_bit_and_less_is_kept(
    plain: dict[float, tuple[list[torch.Tensor], int]], settings: dict[str, Any], dropout: float
) -> None:
    expected, kept = plain[dropout]
    found, kept_less = gradients(dropout, **settings)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kept_less < 0.95 * kept


def test_more_recomputation_keeps_less() -> None:
    def kept(**settings: Any) -> int:
        return gradients(**settings)[1]

    assert kept(**FULL, recompute_num_layers=5) < kept(**FULL) < kept(**FULL, recompute_method="block")
    assert kept(**SELECTIVE, recompute_modules=["core_attn", "mlp"]) < kept(**SELECTIVE)


@pytest.mark.parametrize(
    ("method", "length", "expected"),
    [
        ("uniform", 1, [([0], True), ([1], True), ([2], True), ([3], True), ([4], True)]),
        ("uniform", 2, [([0, 1], True), ([2, 3], True), ([4], True)]),
        ("uniform", 7, [([0, 1, 2, 3, 4], True)]),
        ("block", 2, [([0], True), ([1], True), ([2, 3, 4], False)]),
        ("block", 7, [([0], True), ([1], True), ([2], True), ([3], True), ([4], True), ([], False)]),
    ],
)
def test_runs_of_layers(method: str, length: int, expected: list[tuple[list[int], bool]]) -> None:
    training = TrainingConfig(recompute_granularity="full", recompute_method=method, recompute_num_layers=length)
    assert [(list(layers), again) for layers, again in runs_of_layers(5, training)] == expected
    none = TrainingConfig(recompute_method=method, recompute_num_layers=length)
    assert [(list(layers), again) for layers, again in runs_of_layers(5, none)] == [([0, 1, 2, 3, 4], False)]
