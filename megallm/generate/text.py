"""Texts in, texts out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megallm.agreement import on_every_rank
from megallm.config.report import why_unreadable
from megallm.data.tokenizer.base import Tokenizer
from megallm.generate.choice import SamplingSettings
from megallm.generate.sampling import generate_tokens
from megallm.mesh import Mesh
from megallm.train.datasets import build_tokenizer_of
from megallm.train.engine import Engine, Model


def continue_texts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    settings: Sequence[SamplingSettings],
    stop: Sequence[str] = (),
) -> list[str]:
    """What a model writes after each of `prompts`, by its own `settings`. Called by all ranks, same result on all.

    Ends where the document ends, after `num_tokens` tokens, or before the first of the texts `stop` that it would
    write. Raises ValueError for a prompt without tokens.
    """

    def is_finished(tokens: list[int]) -> bool:
        return bool(stop) and _end_of(tokenizer.decode(tokens), stop) is not None

    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    continued = generate_tokens(model, encoded, num_tokens, settings, tokenizer.eod_id, is_finished)
    return [_text_of(tokens, tokenizer, stop) for tokens in continued]


def _text_of(tokens: list[int], tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    if tokens and tokens[-1] == tokenizer.eod_id:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens)
    return text[: _end_of(text, stop)]


class SampleWriter:
    """Writes the texts of --sample-interval: the prompt and what the model makes of it, the same random numbers each
    time.
    """

    def __init__(self) -> None:
        self._tokenizer: Tokenizer | None = None

    def __call__(self, engine: Engine) -> str:
        """A text. Called by all ranks, same result on all."""
        logging = engine.config.logging
        self._tokenizer = self._tokenizer or build_tokenizer_of(engine.config)
        assert self._tokenizer is not None, "the configuration is validated"
        engine.reducer.finish_gather()
        settings = SamplingSettings(seed=engine.config.training.seed)
        prompt = logging.sample_prompt
        (text,) = continue_texts(engine, self._tokenizer, [prompt], logging.sample_num_tokens, [settings])
        return prompt + text


def _end_of(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the texts `stop` begins in `text`; None where there is none."""
    return min((text.index(word) for word in stop if word in text), default=None)


def read_prompts(mesh: Mesh, source: str) -> list[str]:
    """The lines of a file, or of the standard input for "-", that are not empty. Called by all ranks.

    The first rank reads and tells the others. Raises ValueError on all ranks if it cannot.
    """
    text = on_every_rank(mesh, lambda: _read(source) if mesh.rank == 0 else "").encode()
    size = torch.tensor([len(text)], dtype=torch.int64, device=mesh.device)
    mesh.world.broadcast(size, 0)
    content = torch.zeros(int(size), dtype=torch.uint8, device=mesh.device)
    if mesh.rank == 0:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    mesh.world.broadcast(content, 0)
    return [line for line in bytes(content.tolist()).decode().splitlines() if line.strip()]


def _read(source: str) -> str:
    if source == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(source).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {source} cannot be read: {why_unreadable(error)}") from None
    if not text.strip():
        raise ValueError(f"--prompts {source} holds no text")
    return text
