"""The split of layers over stages: whole, contiguous, and of the smallest largest cost among all splits."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from megallm.config import Config, DataConfig, ModelConfig, ParallelConfig
from megallm.config.stage_layout import parse_stage_layout
from megallm.plan.split import head_cost_in_layers, split_layers, stage_layers

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
    with pytest.raises(ValueError, match="do not fit"):
        split_layers(4, 2, given={0: 5})
    with pytest.raises(ValueError, match="do not fit"):
        split_layers(4, 2, given={0: 1, 1: 2})


def counts_of(num_layers: int, **parallel: object) -> list[int]:
    config = Config(
        model=replace(LLAMA_2_7B, num_layers=num_layers),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
        data=DataConfig(seq_length=4096),
    )
    return [len(layers) for layers in stage_layers(config)]


def test_given_ranks_hold_what_is_given_and_the_others_share_the_rest_evenly() -> None:
    four = {"pipeline_model_parallel_size": 4}
    assert counts_of(32, **four, decoder_first_pipeline_num_layers=7, decoder_last_pipeline_num_layers=5) == [
        7,
        10,
        10,
        5,
    ]
    assert counts_of(32, **four, decoder_first_pipeline_num_layers=5) == [5, 9, 9, 9]
    assert counts_of(32, **four, decoder_last_pipeline_num_layers=6) == [9, 9, 8, 6]
    # As Megatron deals them: every chunk of a rank holds an equal part of the rank's layers.
    virtual = {"num_virtual_stages_per_pipeline_rank": 2}
    both = {"decoder_first_pipeline_num_layers": 4, "decoder_last_pipeline_num_layers": 2}
    assert counts_of(22, **four, **virtual, **both) == [2, 4, 4, 1, 2, 4, 4, 1]


def test_what_is_accounted_for_costs_a_layer_as_in_megatron() -> None:
    embedding, loss = {"account_for_embedding_in_pipeline_split": True}, {"account_for_loss_in_pipeline_split": True}
    four = {"pipeline_model_parallel_size": 4}
    assert counts_of(30, **four, **embedding, **loss) == [7, 8, 8, 7]
    assert counts_of(31, **four, **loss) == [8, 8, 8, 7]
    assert counts_of(31, **four, **embedding) == [7, 8, 8, 8]
    # 2 + 2 over 4 stages: nothing but the embedding on the first, nothing but the output layer on the last.
    assert counts_of(2, **four, **embedding, **loss) == [0, 1, 1, 0]


def test_the_layout_of_stages_is_read_as_in_megatron() -> None:
    assert parse_stage_layout("Et*3|(tt|)*29,L") == [3] + [2] * 29 + [0]
    assert parse_stage_layout("E|(t|)*3,L") == [0, 1, 1, 1, 0]
    assert parse_stage_layout("Ett, |tt||tL") == [2, 2, 0, 1]
    assert parse_stage_layout("E|*3tL") == [0, 0, 0, 1]
    layout = {"pipeline_model_parallel_layout": "Et|ttt|tt|L"}
    assert counts_of(6, pipeline_model_parallel_size=4, **layout) == [1, 3, 2, 0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "embedding"),
        ("t|tL", "embedding"),
        ("tE|tL", "embedding"),
        ("Et|Lt", "output layer"),
        ("Et|m|L", "further tokens"),
        ("Et|(t|t)*x|L", r"'\(\)\*x'"),
        ("Et*99999999|L", "too often"),
    ],
)
def test_an_unreadable_layout_of_stages_is_a_sentence(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_stage_layout(text)
