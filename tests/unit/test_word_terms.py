"""The terms of a task that finds words: what is told of them, and what is differentiated."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megallm.communication import Group, Transport
from megallm.config.operators import OperatorChoices
from megallm.layers.context import LayoutContext
from megallm.ops.cross_entropy import CrossEntropy
from megallm.train.loss import LossScaler
from megallm.train.tasks.words import word_term_names, word_terms

ALONE = Group((0,), 0, Transport(None))
SEQUENCE, BATCH, WORDS, COLUMNS = 5, 3, 19, 24


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)])
def test_the_gradient_is_that_of_torch_and_the_losses_told_are_plain(smoothing: float, z_loss: float, ops: str) -> None:
    """In float64, with padded columns and a mask; twice, as two micro-batches of one batch."""
    generator = torch.Generator().manual_seed(0)
    loss = CrossEntropy(WORDS, label_smoothing=smoothing, z_loss=z_loss)
    names = word_term_names(loss)
    context = LayoutContext(ALONE, False, torch.float64, torch.device("cpu"), seed=1, operators=OperatorChoices(ops))
    masks = (torch.rand(2, BATCH, SEQUENCE, generator=generator) < 0.6).double()
    count = masks.sum()
    scaler = LossScaler(count.repeat(len(names)), ALONE, torch.tensor(8.0, dtype=torch.float64))
    told = torch.zeros(2, dtype=torch.float64)
    for mask in masks:
        logits = 3 * torch.randn(SEQUENCE, BATCH, COLUMNS, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, WORDS, (SEQUENCE, BATCH), generator=generator)
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        terms = word_terms((ours * 1.0,), labels, {"loss_mask": mask}, loss, context)
        assert tuple(term.name for term in terms) == names
        (found,) = torch.autograd.grad(scaler(terms), ours)

        rows, counted = theirs[..., :WORDS].flatten(0, 1), mask.t().flatten()
        squares = rows.logsumexp(-1).square()
        smoothed = functional.cross_entropy(rows, labels.flatten(), reduction="none", label_smoothing=smoothing)
        (wanted,) = torch.autograd.grad(8.0 / count * ((smoothed + z_loss * squares) * counted).sum(), theirs)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
        plain = functional.cross_entropy(rows, labels.flatten(), reduction="none")
        told += torch.stack((plain @ counted, squares @ counted)).detach()
    torch.testing.assert_close(scaler.sums, told[: len(names)], rtol=1e-12, atol=0.0)
