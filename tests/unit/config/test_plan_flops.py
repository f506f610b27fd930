"""Parameters and FLOPs against published models and against a count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megallm.config import ModelConfig
from megallm.plan.flops import flops_per_token, parameter_count

LLAMA = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    position_embedding_type="rope",
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    tie_embeddings=False,
)
LLAMA_2_7B = replace(LLAMA, ffn_hidden_size=11008, vocab_size=32000)
LLAMA_3_8B = replace(LLAMA, ffn_hidden_size=14336, num_query_groups=8, vocab_size=128256)
QWEN_2_5_7B = replace(
    LLAMA,
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    vocab_size=152064,
    add_qkv_bias=True,
)
QWEN_3_0_6B = replace(
    LLAMA,
    num_layers=28,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    qk_layernorm=True,
    tie_embeddings=True,
)
PYTHIA_160M = ModelConfig(
    num_layers=12,
    hidden_size=768,
    num_attention_heads=12,
    vocab_size=50304,
    position_embedding_type="rope",
    rotary_percent=0.25,
    parallel_residual=True,
    tie_embeddings=False,
)
GPT_2 = ModelConfig(
    num_layers=12, hidden_size=768, num_attention_heads=12, max_position_embeddings=1024, vocab_size=50257
)
BERT_BASE = ModelConfig(
    architecture="bert",
    num_layers=12,
    hidden_size=768,
    num_attention_heads=12,
    max_position_embeddings=512,
    vocab_size=30522,
    apply_residual_connection_post_layernorm=True,
)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_3_8B, 8_030_261_248),
        (QWEN_2_5_7B, 7_615_616_512),
        (QWEN_3_0_6B, 596_049_920),
        (PYTHIA_160M, 162_322_944),
        (GPT_2, 124_439_808),
        (BERT_BASE, 110_106_428),
    ],
)
def test_parameters_equal_the_published_models(model: ModelConfig, parameters: int) -> None:
    assert parameter_count(model).total == parameters


@pytest.mark.parametrize(
    ("model", "sequence_length", "weights", "half", "full"),
    [
        (LLAMA_2_7B, 4096, 39.64, 42.86, 46.08),
        (LLAMA_3_8B, 8192, 45.03, 51.47, 57.91),
        (LLAMA_3_8B, 4096, 45.03, 48.25, 51.47),
        (QWEN_2_5_7B, 1024, 42.42, 43.04, 43.65),
    ],
)
def test_flops_per_token_equal_the_table(
    model: ModelConfig, sequence_length: int, weights: float, half: float, full: float
) -> None:
    flops = flops_per_token(model, sequence_length)
    assert flops.weights / 1e9 == pytest.approx(weights, abs=0.006)
    assert flops.half / 1e9 == pytest.approx(half, abs=0.006)
    assert flops.full / 1e9 == pytest.approx(full, abs=0.006)


def test_flops_of_a_small_model_by_hand() -> None:
    model = ModelConfig(
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=20,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=6,
        vocab_size=50,
    )
    # Each product as (rows out, columns in) for one token: q, k, v, output, both matrices of the MLP.
    products = [(24, 8), (12, 8), (12, 8), (8, 24), (20, 8), (8, 20)]
    forward = 3 * sum(2 * rows * columns for rows, columns in products) + 2 * 50 * 8
    scores_and_values = 3 * 4 * 2 * (2 * 16 * 6)
    assert flops_per_token(model, 16).weights == 3 * forward
    assert flops_per_token(model, 16).full == 3 * (forward + scores_and_values)


def test_flops_of_a_small_encoder_by_hand() -> None:
    model = ModelConfig(
        architecture="bert", num_layers=3, hidden_size=8, ffn_hidden_size=20, num_attention_heads=2, vocab_size=50
    )
    in_layers = 3 * 2 * (4 * 8 * 8 + 2 * 20 * 8)
    # Of every token the head's own matrix and the output layer, of each sample's first one the pooler and its two rows.
    head, of_a_sample = 2 * (8 * 8 + 50 * 8), 2 * (8 * 8 + 2 * 8)
    scores_and_values = 3 * 4 * (16 * 8)
    flops = flops_per_token(model, 16)
    assert flops.weights == 3 * (in_layers + head + of_a_sample / 16)
    assert flops.half == flops.full == flops.weights + 3 * scores_and_values
    assert flops_per_token(replace(model, bert_binary_head=False), 16).weights == 3 * (in_layers + head)


def test_parts_of_the_count() -> None:
    count = parameter_count(GPT_2)
    assert (count.embedding, count.positions, count.head) == (50257 * 768, 1024 * 768, 0)
    assert count.final_norm == 2 * 768
    assert count.layers == 12 * (12 * 768**2 + 13 * 768)
    sinusoidal = replace(GPT_2, position_embedding_type="sinusoidal")
    assert parameter_count(sinusoidal).positions == 0
    assert parameter_count(replace(GPT_2, tie_embeddings=False)).head == 50257 * 768


def test_parts_of_a_bert() -> None:
    count = parameter_count(BERT_BASE)
    assert (count.positions, count.types, count.final_norm) == (512 * 768, 2 * 768, 2 * 768)
    assert count.head == (768**2 + 3 * 768 + 30522) + (768**2 + 768) + (2 * 768 + 2)
    without = parameter_count(replace(BERT_BASE, bert_binary_head=False))
    assert (without.types, without.head) == (0, 768**2 + 3 * 768 + 30522)


def test_position_table_takes_the_sequence_length_by_default() -> None:
    unknown = replace(GPT_2, max_position_embeddings=None)
    assert parameter_count(unknown, 1024) == parameter_count(GPT_2)
    with pytest.raises(ValueError, match="--max-position-embeddings"):
        parameter_count(unknown)


def test_unknown_vocabulary_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="--vocab-size"):
        flops_per_token(LLAMA, 128)


def test_a_window_counts_the_places_it_leaves() -> None:
    """Query i sees min(i + 1, 1024) keys: their mean over 4096 queries, in the limit of long sequences."""
    plain, windowed = (
        flops_per_token(model, 4096) for model in (LLAMA_2_7B, replace(LLAMA_2_7B, window_size="1023,0"))
    )
    assert plain.full == windowed.full
    seen = sum(min(i + 1, 1024) for i in range(4096)) / 4096**2
    assert (windowed.half - windowed.weights) / windowed.attention_full == pytest.approx(seen, rel=1e-3)
    assert flops_per_token(replace(LLAMA_2_7B, window_size="-1,0"), 4096) == plain
    assert flops_per_token(replace(LLAMA_2_7B, window_size="5000,0"), 4096) == plain
