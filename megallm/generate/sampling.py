"""Writing texts, one token of each after another, in any layout.

The next token of every text goes through the pipeline executor as a micro-batch does, so that every layout that trains
also writes. Stages keep keys and values of what came before, and a token costs one token's work. Where sequences are
cut over the tensor ranks (sequence parallelism), or once a text is longer than the model's sequence and its beginning
drops out, each token takes a pass over the whole sequence instead.

Texts of different lengths stand in one batch: each has its own positions and sees its own tokens only, so that it
becomes what it would become alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megallm.generate.choice import SamplingSettings, choose
from megallm.layers.cache import KeyValueCache
from megallm.layers.regions import gather_features
from megallm.train.engine import Model

Tensors = tuple[torch.Tensor, ...]


def generate_tokens(
    model: Model,
    prompts: Sequence[list[int]],
    num_tokens: int,
    settings: Sequence[SamplingSettings],
    end_id: int | None = None,
    is_finished: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """Continues each of `prompts` by up to `num_tokens` tokens, by its own `settings`. Called by all ranks, same result
    on all.

    A text ends early at `end_id`, which then is its last token, or where `is_finished` says so of its tokens so far,
    without the prompt. A prompt longer than the model's sequence keeps its end. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("the prompt holds no token: give at least one word")
    generators = [torch.Generator().manual_seed(one.seed) for one in settings]
    texts = [list(prompt) for prompt in prompts]
    growing = list(range(len(texts)))
    with NextLogits(model, max(map(len, texts)) + num_tokens) as next_logits:
        for _ in range(num_tokens):
            logits = next_logits(texts)
            choices = torch.zeros(len(texts), dtype=torch.int64)
            if logits is not None:
                rows = logits.double().cpu()
                for number in growing:
                    choices[number] = choose(rows[number], settings[number], generators[number], texts[number])
            # Only the last pipeline rank has logits.
            choices = choices.to(model.mesh.device)
            model.mesh.pp.broadcast(choices, model.mesh.pp.size - 1)
            for number, choice in zip(list(growing), choices[growing].tolist(), strict=True):
                texts[number].append(choice)
                if choice == end_id or is_finished(texts[number][len(prompts[number]) :]):
                    growing.remove(number)
            if not growing:
                break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


class NextLogits:
    """Logits of the token that follows each of several texts: called again and again with texts that only grow.

    To be used in a `with` block, on all ranks; the model is as it was after it. No text becomes longer than `longest`.
    `cached` False computes the whole sequences each time.
    """

    def __init__(self, model: Model, longest: int, *, cached: bool = True) -> None:
        self._model = model
        self._cached = cached and not model.context.sequence_parallel
        self._length = model.config.data.seq_length
        self._capacity = min(longest, self._length)
        self._message = model.executor.message
        self._cache: KeyValueCache | None = None
        self._num_seen: list[int] = []

    def __enter__(self) -> NextLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self._give(None)
        self._model.executor.expect(self._message)

    def __call__(self, texts: Sequence[list[int]]) -> torch.Tensor | None:
        """Logits [texts, vocabulary] after each of `texts`, on the last pipeline rank; None elsewhere.

        Those of a text that has not grown since the last call mean nothing.
        """
        if self._cached and max(map(len, texts)) > self._length:
            self._cached = False
            self._give(None)
        if not self._cached:
            # What stands behind a window is not seen by causal attention.
            return self._run([text[-self._length :] for text in texts], self._length)
        if self._cache is None:
            self._num_seen = [0] * len(texts)
            self._give(KeyValueCache(self._capacity, len(texts), self._model.mesh.device))
        assert self._cache is not None, "it was given"
        new = [text[seen:] for text, seen in zip(texts, self._num_seen, strict=True)]
        logits = self._run(new, max(map(len, new)))
        self._num_seen = [len(text) for text in texts]
        self._cache.advance([len(tokens) for tokens in new])
        return logits

    def _run(self, rows: list[list[int]], length: int) -> torch.Tensor | None:
        """Logits behind the last token of each row, all of which are filled up to `length`."""
        model, device = self._model, self._model.mesh.device
        ((_, _, hidden_size), dtype), *_ = self._message
        local = length // model.mesh.tp.size if model.context.sequence_parallel else length
        model.executor.expect([((local, len(rows), hidden_size), dtype)])
        positions = torch.arange(length, device=device).expand(len(rows), length)
        if self._cache is not None:
            positions = self._cache.positions(length)
        filled = [row + [0] * (length - len(row)) for row in rows]
        batch = {
            "tokens": torch.tensor(filled, dtype=torch.int64, device=device),
            "position_ids": positions.clamp(max=self._length - 1),
            "sample_ids": torch.arange(len(rows), device=device),
        }
        last = torch.tensor([max(len(row) - 1, 0) for row in rows], device=device)
        kept: list[torch.Tensor] = []

        def keep(outputs: Tensors, _: dict[str, torch.Tensor]) -> torch.Tensor:
            # [sequence, texts, padded vocabulary / tp] -> [texts, vocabulary]
            logits = gather_features(outputs[0][last, batch["sample_ids"]], model.mesh.tp)
            kept.append(logits[:, : model.config.model.vocab_size])
            return kept[0]

        model.executor.run(model.schedule(1, forward_only=True), [batch], keep)
        return kept[0] if kept else None

    def _give(self, cache: KeyValueCache | None) -> None:
        """Gives the stages of this rank a cache, or takes it away."""
        self._cache = cache
        for stage in self._model.chunks.values():
            stage.cache = cache  # type: ignore[assignment]
