from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from megallm.communication import Group, Transport
from megallm.layers.context import LayoutContext, SequenceContext
from megallm.layers.dropout import HiddenDropout
from megallm.layers.embedding import padded_vocab_size, vocabulary_cross_entropy
from megallm.layers.norm import Norm, NormSettings
from megallm.layers.positions import (
    FrequencyScaling,
    RotaryPositions,
    rotary_frequencies,
    rotary_table,
    sinusoidal_table,
)
from megallm.ops import Dropout, dropout_add
from megallm.ops.cross_entropy import CrossEntropy
from megallm.parameter import initialize
from megallm.random import stream_key

CPU = torch.device("cpu")
ALONE = Group((0,), 0, Transport(None))
STEP = torch.tensor(4)


def test_sinusoids_follow_the_formula() -> None:
    table = sinusoidal_table(12, 10, torch.float64, CPU)
    assert table.shape == (12, 10)
    for position in range(12):
        for feature in range(10):
            angle = position / 10000.0 ** (2 * (feature // 2) / 10)
            expected = math.sin(angle) if feature % 2 == 0 else math.cos(angle)
            assert float(table[position, feature]) == pytest.approx(expected, abs=1e-15)
    assert torch.equal(sinusoidal_table(12, 10, torch.float32, CPU), table.float()), "rounded once"


def test_rotary_tables_follow_the_formula() -> None:
    positions = torch.tensor([[0, 3], [5, 0], [1000, 7]])  # [sequence, batch]
    cosines, sines = rotary_table(positions, rotary_frequencies(8, 500.0, torch.float64, CPU))
    assert cosines.shape == sines.shape == (3, 2, 1, 8)
    for i in range(3):
        for j in range(2):
            for feature in range(8):
                angle = int(positions[i, j]) * 500.0 ** (-2 * (feature % 4) / 8)
                assert float(cosines[i, j, 0, feature]) == pytest.approx(math.cos(angle), abs=1e-12)
                assert float(sines[i, j, 0, feature]) == pytest.approx(math.sin(angle), abs=1e-12)


def test_rotary_tables_have_the_dtype_asked_for() -> None:
    cosines, sines = rotary_table(torch.arange(4).unsqueeze(1), rotary_frequencies(8, 1e4, torch.float32, CPU))
    assert cosines.dtype == sines.dtype == torch.float32


def test_frequencies_are_scaled_by_how_often_they_turn_within_the_original_length() -> None:
    """Fewer than two turns: divided by 8. More than five: kept. Three and a half: half of each."""
    turns = torch.tensor([0.5, 2.0, 3.5, 5.0, 20.0], dtype=torch.float64)
    frequencies = turns * 2.0 * math.pi / 64
    scaled = FrequencyScaling(factor=8.0, low=2.0, high=5.0, original_length=64).apply(frequencies)
    expected = torch.tensor([1 / 8, 1 / 8, (1 + 1 / 8) / 2, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(scaled / frequencies, expected)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_interleaved_pairs_give_the_scores_of_complex_rotation(implementation: str) -> None:
    """Features 2 i and 2 i + 1 are one complex number, turned by position x frequency; two features stay."""
    width, generator = 6, torch.Generator().manual_seed(2)
    frequencies = rotary_frequencies(width, 100.0, torch.float64, CPU)
    rotation = RotaryPositions(16, frequencies, interleaved=True)(5, None)
    query, key = (torch.randn(5, 2, 3, width + 2, dtype=torch.float64, generator=generator) for _ in range(2))

    def turned(features: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(features[..., :width].unflatten(-1, (width // 2, 2)))
        angles = torch.arange(5).double().unsqueeze(1) * frequencies  # [sequence, pairs]
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, None]
        return torch.cat((torch.view_as_real(pairs).flatten(-2), features[..., width:]), dim=-1)

    def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.einsum("qbhd,kbhd->bhqk", query, key)

    expected = scores(turned(query), turned(key))
    torch.testing.assert_close(scores(*rotation.apply(query, key, implementation)), expected, rtol=0, atol=1e-12)


def test_position_ids_choose_the_rows_of_the_rotary_table() -> None:
    rotary = RotaryPositions(8, rotary_frequencies(4, 100.0, torch.float64, CPU), interleaved=False)
    chosen = rotary(3, torch.tensor([[0, 1, 2], [4, 0, 7]]))
    plain = rotary(8, None)
    assert chosen.cosines.shape == (3, 2, 1, 4)
    assert torch.equal(chosen.cosines[:, 1, 0], plain.cosines[[4, 0, 7], 0, 0])
    assert torch.equal(chosen.sines[:, 0], plain.sines[:3, 0])


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_zero_centred_norm_weights_keep_digits_that_bfloat16_has_not_around_one(kind: str) -> None:
    context = LayoutContext(ALONE, False, torch.bfloat16, CPU, seed=1)
    norm = Norm("norm", NormSettings(kind, 1e-5, zero_centered=True), 64, context)
    for parameter in norm.parameters():
        initialize(parameter, seed=1)
        assert not parameter.any(), "a weight of one is kept as zero"
    with torch.no_grad():
        norm.weight.fill_(2.0**-9)
        hidden = torch.randn(100, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
        got = norm(hidden)
    centred = hidden.double() - (hidden.double().mean(-1, keepdim=True) if kind == "LayerNorm" else 0.0)
    unscaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert got.dtype == torch.bfloat16
    assert (got == (unscaled * (1 + 2.0**-9)).bfloat16()).float().mean() > 0.99
    assert (got == unscaled.bfloat16()).float().mean() < 0.8, "1 + 2^-9 is 1 in bfloat16"


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "tp", "padded"),
    [(51, 1, 1, 51), (51, 1, 2, 52), (51, 1, 8, 56), (52, 1, 4, 52), (50257, 128, 8, 51200), (1, 1, 8, 8)],
)
def test_padded_vocabulary(vocab_size: int, multiple: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, multiple, tp) == padded


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_cross_entropy_is_that_of_torch(dtype: torch.dtype, bound: float, padding: int) -> None:
    vocab_size = 23
    generator = torch.Generator().manual_seed(0)
    logits = (4.0 * torch.randn(7, 3, vocab_size + padding, generator=generator, dtype=torch.float64)).to(dtype)
    # Whatever stands in the columns of padding must not count.
    logits[..., vocab_size:] = 1e3
    targets = torch.randint(0, vocab_size, (7, 3), generator=generator)
    targets[0, 0], targets[0, 1] = 0, vocab_size - 1
    weights = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    weights[1] = 0.0

    wanted_input = logits.clone().double().requires_grad_()
    wanted = functional.cross_entropy(wanted_input[..., :vocab_size].flatten(0, 1), targets.flatten(), reduction="none")
    (wanted.view(7, 3) * weights).sum().backward()

    ours_input = logits.clone().requires_grad_()
    # As in the model, the logits are the output of another operator, so that they may be overwritten.
    losses = vocabulary_cross_entropy(ours_input * 1.0, targets, CrossEntropy(vocab_size), ALONE).objective
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (losses * weights.to(losses.dtype)).sum().backward()

    assert torch.allclose(losses.double().flatten(), wanted.detach(), rtol=bound, atol=bound)
    assert ours_input.grad is not None
    assert wanted_input.grad is not None
    assert ours_input.grad.dtype == dtype
    assert torch.allclose(ours_input.grad.double(), wanted_input.grad, rtol=bound, atol=bound)
    assert torch.equal(ours_input.grad[..., vocab_size:], torch.zeros_like(ours_input.grad[..., vocab_size:]))
    assert torch.equal(ours_input.grad[1], torch.zeros_like(ours_input.grad[1])), "masked tokens have no gradient"


def test_cross_entropy_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]])
    losses = vocabulary_cross_entropy(logits.clone(), torch.tensor([[1]]), CrossEntropy(3), ALONE).objective
    assert losses.tolist() == [[2e4]]


def test_dropout_scales_what_it_keeps() -> None:
    key, rows = stream_key(0, "dropout"), torch.arange(100)
    input = torch.randn(100, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = dropout_add(input, Dropout(0.25, key, STEP, rows))
    kept = output != 0.0
    assert torch.allclose(output[kept], input[kept] / 0.75, rtol=1e-15)
    assert abs(float(kept.double().mean()) - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    grad = torch.randn(100, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output.backward(grad)
    assert input.grad is not None
    assert torch.allclose(input.grad, grad * kept / 0.75, rtol=1e-15)


def _context(seed: int = 0) -> LayoutContext:
    return LayoutContext(tp=ALONE, sequence_parallel=False, dtype=torch.float64, device=CPU, seed=seed)


def _sequence(samples: list[int], positions: range, step: torch.Tensor | None = STEP) -> SequenceContext:
    return SequenceContext(torch.tensor(samples), 16, torch.tensor(list(positions)), step=step)


def test_hidden_dropout_depends_on_the_element_alone() -> None:
    """A micro-batch's part, or a part of the sequence, is masked as it is within the whole batch."""
    dropout = HiddenDropout("name", 0.5, _context())
    whole = dropout(torch.ones(16, 4, 32), _sequence([0, 1, 2, 3], range(16)))
    assert torch.equal(dropout(torch.ones(16, 2, 32), _sequence([2, 1], range(16))), whole[:, [2, 1]])
    assert torch.equal(dropout(torch.ones(8, 4, 32), _sequence([0, 1, 2, 3], range(8, 16))), whole[8:])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole[0], whole[1])


def test_hidden_dropout_differs_by_step_name_and_seed() -> None:
    ones, sequence = torch.ones(16, 4, 32), _sequence([0, 1, 2, 3], range(16))
    masked = HiddenDropout("name", 0.5, _context())(ones, sequence)
    others = [
        HiddenDropout("other", 0.5, _context())(ones, sequence),
        HiddenDropout("name", 0.5, _context(seed=1))(ones, sequence),
        HiddenDropout("name", 0.5, _context())(ones, _sequence([0, 1, 2, 3], range(16), step=STEP + 1)),
    ]
    for other in others:
        assert 0.4 < float((masked == other).double().mean()) < 0.6


@pytest.mark.parametrize(("probability", "step"), [(0.0, STEP), (0.5, None)])
def test_hidden_dropout_is_off(probability: float, step: torch.Tensor | None) -> None:
    hidden = torch.ones(16, 1, 32)
    assert HiddenDropout("name", probability, _context())(hidden, _sequence([0], range(16), step)) is hidden
