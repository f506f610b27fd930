"""How well a model predicts a text: loss and perplexity per token, word and byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megallm.data.tokenizer.base import Tokenizer
from megallm.train.engine import Model
from megallm.train.loss import LossTerm


@dataclass(frozen=True)
class Score:
    """The sum of the negative logarithms of the tokens' probabilities, and what it may be divided by.

    `words` are parted by white space, `num_bytes` are those of the text in UTF-8. The per-word and per-byte figures do
    not depend on the tokenizer, so that models with different ones may be compared (Gao et al., arXiv:2101.00027,
    section 3.1).
    """

    loss_sum: float
    tokens: int
    words: int
    num_bytes: int

    def to_dict(self) -> dict[str, float]:
        """Everything that is told, by name. Bits are logarithms of base 2."""
        figures: dict[str, float] = {"tokens": self.tokens, "words": self.words, "bytes": self.num_bytes}
        for unit, count in (("token", self.tokens), ("word", self.words), ("byte", self.num_bytes)):
            loss = self.loss_sum / count if count else math.nan
            figures[f"loss_per_{unit}"] = loss
            figures[f"perplexity_per_{unit}"] = math.exp(loss) if loss < 700 else math.inf
        figures["bits_per_byte"] = figures["loss_per_byte"] / math.log(2.0)
        return figures


def score(model: Model, tokenizer: Tokenizer, documents: Sequence[np.ndarray]) -> Score:
    """What a model makes of documents of tokens, one behind the other. Called by all ranks, same result on all.

    The tokens are cut into windows of the model's sequence length, each of which is predicted from its own beginning
    on; every token but the very first of all is predicted once. Words and bytes are those of the decoded documents,
    without their end-of-document tokens.

    Raises ValueError where there are fewer than two tokens.
    """
    tokens = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents] or [np.zeros(0, np.int64)])
    if len(tokens) < 2:
        raise ValueError(f"the data holds {len(tokens)} tokens: there is nothing to predict")
    mesh = model.mesh
    sums = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    for batch in _own_batches(model, tokens):
        sums += _loss_sum(model, batch)
    mesh.world.all_reduce(sums)
    texts = [tokenizer.decode([int(token) for token in part if token != tokenizer.eod_id]) for part in documents]
    num_words = sum(len(text.split()) for text in texts)
    return Score(float(sums), len(tokens) - 1, num_words, sum(len(text.encode()) for text in texts))


def _own_batches(model: Model, tokens: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
    """This data parallel rank's micro-batches. All ranks have equally many; what is missing to that counts nothing."""
    length, size, replicas = model.config.data.seq_length, model.config.training.micro_batch_size, model.mesh.dp
    num_windows = -(-(len(tokens) - 1) // length)
    num_batches = -(-num_windows // (size * replicas.size))
    padded = np.zeros(num_batches * size * replicas.size * length + 1, dtype=np.int64)
    padded[: len(tokens)] = tokens
    counts = np.arange(len(padded) - 1) < len(tokens) - 1
    for number in range(num_batches):
        first = (number * replicas.size + replicas.rank) * size * length
        window = slice(first, first + size * length)
        yield {
            name: torch.from_numpy(values[window].reshape(size, length).copy()).to(model.mesh.device)
            for name, values in (("tokens", padded[:-1]), ("labels", padded[1:]), ("loss_mask", counts))
        }


def _loss_sum(model: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum over the counting tokens of a micro-batch, on one of the ranks that know it; 0 on the others: float64."""
    size, length = batch["tokens"].shape
    device, mesh = batch["tokens"].device, model.mesh
    batch["loss_mask"] = batch["loss_mask"].float()
    batch["position_ids"] = torch.arange(length, device=device).expand(size, length)
    batch["sample_ids"] = torch.arange(size, device=device)
    kept: list[LossTerm] = []

    def keep(outputs: tuple[torch.Tensor, ...], micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        kept.extend(model.task.loss_terms(outputs, micro_batch, model.context))
        return kept[0].sum

    model.executor.run(model.schedule(1, forward_only=True), [batch], keep)
    if not kept or mesh.tp.rank != 0:
        return torch.zeros((), dtype=torch.float64, device=device)
    return kept[0].sum.double()
