"""Sampling one token after another.

Each token takes one forward pass over the whole sequence through the pipeline executor, so that every layout that
trains also generates. There is no key-value cache: the cost of a token does not depend on how many came before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megallm.layers.regions import gather_features
from megallm.train.engine import Model

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen.

    Temperature 0 takes the most likely one; `top_k` 0 and `top_p` 1 leave all tokens in.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ValueError(f"--temperature {self.temperature} is negative; 0 takes the most likely token, 1 samples")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} is negative; 0 leaves all tokens in")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p {self.top_p} is not in (0, 1]; 1 leaves all tokens in")


def generate_tokens(
    model: Model,
    prompt: list[int],
    num_tokens: int,
    settings: SamplingSettings,
    end_id: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continues `prompt` by up to `num_tokens` tokens, ending early at `end_id`. Called by all ranks, same result on
    all.

    `on_token` is called with each token as it comes. A prompt longer than the model's sequence keeps its end. Raises
    ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt holds no token: give at least one word")
    length = model.config.data.seq_length
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = tokens[-length:]
        logits = _next_logits(model, window)
        choice = torch.zeros((), dtype=torch.int64)
        if logits is not None:
            choice = choose(logits.double().cpu(), settings, generator)
        # Only the last pipeline rank has logits.
        choice = choice.to(model.mesh.device)
        model.mesh.pp.broadcast(choice, model.mesh.pp.size - 1)
        tokens.append(int(choice))
        if tokens[-1] == end_id:
            break
        if on_token is not None:
            on_token(tokens[-1])
    return tokens[len(prompt) :]


def choose(logits: torch.Tensor, settings: SamplingSettings, generator: torch.Generator) -> torch.Tensor:
    """A token from `logits` [vocabulary]: int64 scalar."""
    if settings.temperature == 0.0:
        return logits.argmax()
    logits = logits / settings.temperature
    if settings.top_k:
        kept = min(settings.top_k, len(logits))
        logits = logits.masked_fill(logits < logits.topk(kept).values[-1], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if settings.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # A token stays if those before it do not reach top_p by themselves: the most likely one always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= settings.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(0)


def _next_logits(model: Model, window: list[int]) -> torch.Tensor | None:
    """Logits [vocabulary] of the token after `window`, on the last pipeline rank; None elsewhere."""
    length, vocab_size, device = model.config.data.seq_length, model.config.model.vocab_size, model.mesh.device
    # What stands after the window is not seen by causal attention.
    tokens = torch.tensor([window + [0] * (length - len(window))], dtype=torch.int64, device=device)
    batch = {
        "tokens": tokens,
        "position_ids": torch.arange(length, device=device).unsqueeze(0),
        "sample_ids": torch.zeros(1, dtype=torch.int64, device=device),
    }
    kept: list[torch.Tensor] = []

    def keep(outputs: Tensors, _: dict[str, torch.Tensor]) -> torch.Tensor:
        # [sequence, 1, padded vocabulary / tp] -> [vocabulary]
        kept.append(gather_features(outputs[0][len(window) - 1, 0], model.mesh.tp)[:vocab_size])
        return kept[0]

    model.executor.run(model.schedule(1, forward_only=True), [batch], keep)
    return kept[0] if kept else None
