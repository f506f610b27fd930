"""Stacked micro-batches, with and without worker processes, and the mock data that they are often made of."""

import numpy as np
import pytest
import torch

from megallm.data.feeding.loader import build_loader
from megallm.data.feeding.sampler import GlobalBatchSampler
from megallm.data.samples.mock import MockDataset

# The first tokens of the fixture below.
GOLDEN_TOKENS = [0, 43, 1, 1, 26, 0, 43, 1, 1, 26, 88, 9, 1, 1, 26, 0]


@pytest.fixture
def mock():
    return MockDataset(num_samples=50, sequence_length=16, vocab_size=100, seed=7)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches(mock, num_workers):
    sampler = GlobalBatchSampler(50, 4, 12, 3, 1, 2)
    steps = list(build_loader(mock, sampler, num_workers))
    assert len(steps) == 3
    for step, micro_batches in enumerate(steps):
        assert [batch["sample_ids"].tolist() for batch in micro_batches] == [[3, 4, 5], [9, 10, 11]]
        for batch in micro_batches:
            assert batch["tokens"].shape == batch["labels"].shape == (3, 16)
            assert batch["tokens"].dtype == batch["sample_ids"].dtype == torch.int64
            assert batch["loss_mask"].dtype == torch.float32
            for row, place in enumerate(batch["sample_ids"].tolist()):
                expected = mock[4 + 12 * step + place]
                for name, array in expected.items():
                    assert np.array_equal(batch[name][row].numpy(), array)


def test_global_generator_is_left_alone(mock):
    before = torch.get_rng_state()
    list(build_loader(mock, GlobalBatchSampler(50, 0, 10, 10, 0, 1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_mock_samples_depend_on_seed_and_index_alone(mock):
    batch = mock.get_batch(np.array([9, 0]))
    assert all(np.array_equal(array, np.stack([mock[9][name], mock[0][name]])) for name, array in batch.items())
    again = MockDataset(50, 16, 100, 7)
    again[3]
    assert np.array_equal(again[9]["tokens"], mock[9]["tokens"])
    assert not np.array_equal(mock[9]["tokens"], mock[8]["tokens"])
    assert not np.array_equal(mock[9]["tokens"], MockDataset(50, 16, 100, 8)[9]["tokens"])
    # Written down: a change of the stream would change every run on mock data.
    assert mock[0]["tokens"].tolist() == GOLDEN_TOKENS
    assert np.array_equal(mock[9]["tokens"][1:], mock[9]["labels"][:-1])


@pytest.mark.parametrize("vocab_size", [1, 2, 1000, 128_256])
def test_mock_tokens_are_in_the_vocabulary(vocab_size):
    tokens = np.concatenate([MockDataset(20, 64, vocab_size, 1)[index]["tokens"] for index in range(20)])
    assert tokens.min() >= 0
    assert tokens.max() < vocab_size


def test_mock_data_can_be_learnt():
    """A sample holds its pattern again and again: most tokens repeat at some distance of at most 32."""
    dataset = MockDataset(40, 256, 50_000, 3)
    for index in range(40):
        tokens = dataset[index]["tokens"]
        assert max(np.mean(tokens[:-shift] == tokens[shift:]) for shift in range(1, 33)) > 0.75


def test_mock_mistakes(mock):
    with pytest.raises(ValueError, match="vocabulary size of mock data is 0, but must be 1 at least"):
        MockDataset(10, 16, 0, 1)
    with pytest.raises(IndexError):
        mock[50]
