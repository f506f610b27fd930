"""Documents packed into one sample are read by the model as if each stood alone, where the resets ask for that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megallm.communication import Group, Transport
from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.data.samples.gpt import GPTDatasetSettings, make_batch
from megallm.layers.context import LayoutContext
from megallm.model.gpt import GPTStage

END = 9
DOCUMENTS = [[3, 5, 8, END], [1, END], [4, 4, 2, 7, 6, END], [8]]
SOUND = {
    "model.num_layers": 2,
    "model.hidden_size": 16,
    "model.num_attention_heads": 4,
    "model.vocab_size": 10,
    "data.mock_data": True,
    "data.tokenizer_type": "NullTokenizer",
    "data.seq_length": 13,
    "training.micro_batch_size": 1,
    "training.train_iters": 1,
    "training.fp64": True,
    "optimizer.lr": 1e-2,
}


def logits(text: list[int], positions: str, *, reset: bool) -> torch.Tensor:
    """What a model of fixed weights says to each token of `text` but the last, [tokens, vocabulary]."""
    options = {"data.reset_position_ids": reset, "data.reset_attention_mask": reset}
    config = resolve(build(SOUND | options | {"model.position_embedding_type": positions}), 1)
    alone = Group((0,), 0, Transport(None))
    context = LayoutContext(alone, False, torch.float64, torch.device("cpu"), seed=1)
    stage = GPTStage(config, range(2), context, is_first=True, is_last=True)
    stage.initialize()
    chosen = GPTDatasetSettings(len(text) - 1, eod_id=END, reset_position_ids=reset, reset_attention_mask=reset)
    batch = {name: torch.from_numpy(array) for name, array in make_batch(np.array([text]), chosen).items()}
    with torch.no_grad():
        return stage((), batch | {"sample_ids": torch.zeros(1, dtype=torch.int64)}, None)[0][:, 0]


@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
def test_packed_documents_are_read_as_if_alone(positions):
    packed = logits([token for document in DOCUMENTS for token in document], positions, reset=True)
    # Every document is followed by some token, which is not an input.
    each = torch.cat([logits([*document, 0], positions, reset=True) for document in DOCUMENTS])
    torch.testing.assert_close(packed, each[: len(packed)], rtol=1e-12, atol=1e-12)


def test_without_the_resets_documents_see_each_other():
    packed = logits([token for document in DOCUMENTS for token in document], "rope", reset=False)
    each = torch.cat([logits([*document, 0], "rope", reset=False) for document in DOCUMENTS])
    torch.testing.assert_close(packed[:4], each[:4], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(packed[4:], each[4 : len(packed)], rtol=1e-6)
