"""Writing a text, one token after another, in any layout.

Every token goes through the pipeline executor as a micro-batch does, so that every layout that trains also writes.
Stages keep keys and values of what came before, and a token costs one token's work. Where sequences are cut over the
tensor ranks (sequence parallelism), or once a text is longer than the model's sequence and its beginning drops out,
each token takes a pass over the whole sequence instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megallm.generate.choice import SamplingSettings, choose
from megallm.layers.cache import KeyValueCache
from megallm.layers.regions import gather_features
from megallm.train.engine import Model

Tensors = tuple[torch.Tensor, ...]


def generate_tokens(
    model: Model,
    prompt: list[int],
    num_tokens: int,
    settings: SamplingSettings,
    end_id: int | None = None,
    is_finished: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[int]:
    """Continues `prompt` by up to `num_tokens` tokens. Called by all ranks, same result on all.

    Ends early at `end_id`, which then is the last token, or where `is_finished` says so of the tokens so far, without
    the prompt. A prompt longer than the model's sequence keeps its end. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt holds no token: give at least one word")
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = list(prompt)
    with NextLogits(model) as next_logits:
        for _ in range(num_tokens):
            logits = next_logits(tokens)
            choice = torch.zeros((), dtype=torch.int64)
            if logits is not None:
                choice = choose(logits.double().cpu(), settings, generator, tokens)
            # Only the last pipeline rank has logits.
            choice = choice.to(model.mesh.device)
            model.mesh.pp.broadcast(choice, model.mesh.pp.size - 1)
            tokens.append(int(choice))
            if tokens[-1] == end_id or is_finished(tokens[len(prompt) :]):
                break
    return tokens[len(prompt) :]


class NextLogits:
    """Logits of the token that follows: called again and again with a list of tokens that only grows.

    To be used in a `with` block, on all ranks; the model is as it was after it. `cached` False computes the whole
    sequence each time.
    """

    def __init__(self, model: Model, *, cached: bool = True) -> None:
        self._model = model
        self._cached = cached and not model.context.sequence_parallel
        self._length = model.config.data.seq_length
        self._message = model.executor.message
        self._num_seen = 0

    def __enter__(self) -> NextLogits:
        if self._cached:
            self._give_caches(self._length)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_caches(None)
        self._model.executor.expect(self._message)

    def __call__(self, tokens: list[int]) -> torch.Tensor | None:
        """Logits [vocabulary] after `tokens`, on the last pipeline rank; None elsewhere."""
        if self._cached and len(tokens) > self._length:
            self._cached = False
            self._give_caches(None)
        if self._cached:
            new, self._num_seen = tokens[self._num_seen :], len(tokens)
            return self._run(new, len(tokens) - len(new), len(new))
        window = tokens[-self._length :]
        # What stands after the window is not seen by causal attention.
        return self._run(window + [0] * (self._length - len(window)), 0, len(window))

    def _run(self, tokens: list[int], first_position: int, num_tokens: int) -> torch.Tensor | None:
        """Logits after number `num_tokens` of `tokens`, of which the first stands at `first_position`."""
        model, device = self._model, self._model.mesh.device
        ((_, _, hidden_size), dtype), *_ = self._message
        local = len(tokens) // model.mesh.tp.size if model.context.sequence_parallel else len(tokens)
        model.executor.expect([((local, 1, hidden_size), dtype)])
        batch = {
            "tokens": torch.tensor([tokens], dtype=torch.int64, device=device),
            "position_ids": (torch.arange(len(tokens), device=device) + first_position).unsqueeze(0),
            "sample_ids": torch.zeros(1, dtype=torch.int64, device=device),
        }
        kept: list[torch.Tensor] = []

        def keep(outputs: Tensors, _: dict[str, torch.Tensor]) -> torch.Tensor:
            # [sequence, 1, padded vocabulary / tp] -> [vocabulary]
            logits = gather_features(outputs[0][num_tokens - 1, 0], model.mesh.tp)
            kept.append(logits[: model.config.model.vocab_size])
            return kept[0]

        model.executor.run(model.schedule(1, forward_only=True), [batch], keep)
        return kept[0] if kept else None

    def _give_caches(self, capacity: int | None) -> None:
        """Gives each stage a cache of its own, since each sees every token once; or takes them away."""
        for stage in self._model.chunks.values():
            stage.cache = None if capacity is None else KeyValueCache(capacity)  # type: ignore[assignment]
