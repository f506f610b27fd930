"""The split of layers over stages: whole, contiguous, and of the smallest largest cost among all splits."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from megallm.config import ModelConfig
from megallm.plan.split import head_cost_in_layers, split_layers

LLAMA_2_7B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    activation="swiglu",
    vocab_size=32000,
)


def counts(*arguments: float) -> list[int]:
    return [len(layers) for layers in split_layers(*arguments)]  # type: ignore[arg-type]


def cost_of(split: list[int] | tuple[int, ...], embedding: float, head: float) -> list[float]:
    costs = [float(count) for count in split]
    costs[0] += embedding
    costs[-1] += head
    return costs


def test_no_layer_is_dropped_and_every_stage_has_one() -> None:
    for num_layers, num_stages in itertools.product(range(1, 34), range(1, 9)):
        ranges = split_layers(num_layers, num_stages, 0.1, 2.5)
        assert [layer for layers in ranges for layer in layers] == list(range(num_layers))
        assert len(ranges) == num_stages
        assert num_layers < num_stages or all(ranges)


def test_no_split_has_a_smaller_largest_cost() -> None:
    draw = random.Random(0)
    for _ in range(120):
        num_stages = draw.randint(1, 4)
        num_layers = draw.randint(num_stages, 9)
        embedding, head = draw.choice([0.0, 0.3, 1.7]), draw.choice([0.0, 0.6, 2.2, 5.0])
        found = cost_of(counts(num_layers, num_stages, embedding, head), embedding, head)
        every = (
            split
            for split in itertools.product(range(1, num_layers + 1), repeat=num_stages)
            if sum(split) == num_layers
        )
        best = min(sorted(cost_of(split, embedding, head), reverse=True) for split in every)
        assert sorted(found, reverse=True) == pytest.approx(best)


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8, 16])
def test_divisible_model_with_a_small_vocabulary_stays_even(num_stages: int) -> None:
    head = head_cost_in_layers(LLAMA_2_7B, 4096)
    assert 0.5 < head < 0.7
    assert set(counts(32, num_stages, 0.0, head)) == {32 // num_stages}


def test_large_vocabulary_takes_layers_off_the_last_stage() -> None:
    head = head_cost_in_layers(replace(LLAMA_2_7B, vocab_size=128256), 4096)
    assert counts(32, 4, 0.0, head) == [9, 9, 8, 6]


def test_among_equals_earlier_stages_hold_more() -> None:
    assert counts(10, 4) == [3, 3, 2, 2]
    assert counts(5, 2) == [3, 2]
    assert counts(5, 2, 1.0, 0.0) == [2, 3]


def test_impossible_sizes_are_sentences() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        split_layers(0, 2)
    with pytest.raises(ValueError, match="negative"):
        split_layers(4, 2, 0.0, -1.0)
