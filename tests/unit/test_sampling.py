"""The choice of the next token."""

from __future__ import annotations

import pytest
import torch

from megallm.generate.choice import SamplingSettings, choose

LOGITS = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05], dtype=torch.float64).log()
NUM_DRAWS = 4000


def draw(settings: SamplingSettings, count: int = NUM_DRAWS, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """Shares of each token among many choices."""
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.stack([choose(logits, settings, generator) for _ in range(count)])
    return torch.bincount(chosen, minlength=len(logits)) / count


def assert_shares(settings: SamplingSettings, wanted: list[float]) -> None:
    """Each share within five standard deviations of what it should be; a share of 0 is never drawn."""
    for share, want in zip(draw(settings).tolist(), wanted, strict=True):
        assert abs(share - want) <= 5 * (want * (1 - want) / NUM_DRAWS) ** 0.5


def test_temperature_zero_takes_the_most_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert choose(LOGITS, SamplingSettings(temperature=0.0), generator).item() == 1
    assert torch.equal(generator.get_state(), state), "nothing was drawn"


def test_all_tokens_are_drawn_by_their_probability() -> None:
    assert_shares(SamplingSettings(), [0.1, 0.5, 0.2, 0.15, 0.05])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    powers = LOGITS.exp() ** (1 / temperature)
    assert_shares(SamplingSettings(temperature=temperature), (powers / powers.sum()).tolist())


def test_top_k_keeps_the_most_likely() -> None:
    assert_shares(SamplingSettings(top_k=1), [0, 1, 0, 0, 0])
    assert_shares(SamplingSettings(top_k=2), [0, 5 / 7, 2 / 7, 0, 0])
    assert_shares(SamplingSettings(top_k=99), [0.1, 0.5, 0.2, 0.15, 0.05])


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert_shares(SamplingSettings(top_p=0.01), [0, 1, 0, 0, 0])
    assert_shares(SamplingSettings(top_p=0.49), [0, 1, 0, 0, 0])
    assert_shares(SamplingSettings(top_p=0.6), [0, 5 / 7, 2 / 7, 0, 0])
    assert_shares(SamplingSettings(top_p=0.99), [0.1, 0.5, 0.2, 0.15, 0.05])


def test_top_p_counts_what_top_k_left() -> None:
    # Of 5/7 and 2/7, the first alone reaches 0.7; of all five it would not.
    assert_shares(SamplingSettings(top_k=2, top_p=0.7), [0, 1, 0, 0, 0])


def test_top_p_follows_the_temperature() -> None:
    assert_shares(SamplingSettings(temperature=0.1, top_p=0.9), [0, 1, 0, 0, 0])


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0], dtype=torch.float64)
    shares = draw(SamplingSettings(), 200, logits)
    assert shares[0] == shares[2] == 0.0
    assert draw(SamplingSettings(top_k=3), 200, logits)[0] == 0.0


def test_what_was_there_becomes_less_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5], dtype=torch.float64)
    settings = SamplingSettings(temperature=0.0, repetition_penalty=2.0)
    # Positive logits are divided, negative ones multiplied: 1, 1.5, -1, -1.5, and then 1, 0.75, -2, -1.5.
    assert choose(logits, settings, generator, [0, 0, 0]).item() == 1
    assert choose(logits, settings, generator, [0, 1, 2]).item() == 0
    assert choose(-logits.flip(0), settings, generator, [0]).item() == 1
    assert choose(logits[2:], settings, generator, [0]).item() == 1
    assert choose(logits, settings, generator).item() == 0


def test_seeds_decide() -> None:
    def series(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(choose(LOGITS, SamplingSettings(), generator)) for _ in range(50)]

    assert series(1) == series(1) != series(2)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"temperature": -0.5}, "--temperature -0.5"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        SamplingSettings(**settings)  # type: ignore[arg-type]
