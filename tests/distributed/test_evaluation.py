"""What an evaluation measures, and what it leaves for those that come after it."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import Mock

import pytest

from megallm.data.samples.mock import MockDataset
from megallm.train.datasets import Datasets
from megallm.train.evaluation import Evaluation
from megallm.train.step import evaluate_step, train_step
from megallm.train.stopping import NOTHING, Wish
from tests.distributed.parity import GPT, LLAMA, Case, global_batch, make_engine, masked_batch, micro_batches


def test_the_longest_evaluation_is_remembered_and_what_was_read_is_counted() -> None:
    engine = make_engine(0, Case("", LLAMA | {"training.eval_iters": 2}))
    batch, data = engine.config.training.global_batch_size, engine.config.data
    texts = MockDataset(100, data.seq_length, engine.config.model.vocab_size, 1)
    with ExitStack() as stack:
        evaluation = Evaluation(engine, Datasets(texts, {"": texts}), stack)
        # Interrupted, it counts nothing and goes on where it was.
        assert evaluation.run(Mock(), lambda: Wish(True, None)).save
        assert (evaluation.seconds, engine.progress.consumed_valid_samples) == (0.0, 0)
        reporter = Mock()
        assert evaluation.run(reporter, lambda: NOTHING) == NOTHING
        longest = evaluation.seconds
        assert longest > 0
        assert engine.progress.consumed_valid_samples == 2 * batch
        evaluation.seconds = longest + 1000
        evaluation.run(reporter, lambda: NOTHING)
        assert evaluation.seconds == longest + 1000
        assert engine.progress.consumed_valid_samples == 4 * batch


@pytest.mark.parametrize("chunk_size", [0, 5])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_losses_that_are_told_have_no_smoothing_and_no_z_loss(kind: str, chunk_size: int) -> None:
    """Neither those of an evaluation nor those of a step; the step itself is another."""
    (plain, *plain_told), *regularised = (
        _evaluate_and_train(kind, {"training.loss_chunk_size": chunk_size} | more)
        for more in ({}, {"training.label_smoothing": 0.1}, {"training.z_loss_coeff": 0.02})
    )
    for norm, *told in regularised:
        assert abs(norm - plain) > 1e-3 * plain
        for losses, wanted in zip(told, plain_told, strict=True):
            squares = losses.pop("z_loss", None)
            assert losses == pytest.approx(wanted, rel=1e-12)
    assert squares > 1.0, "the mean square of the logarithm of some 50 words' exponentials"


def _evaluate_and_train(kind: str, settings: dict[str, object]) -> tuple[float, dict[str, float], dict[str, float]]:
    """The norm of a step's gradient, and the losses of an evaluation and of that step on the same batch."""
    engine = make_engine(0, Case("", GPT | settings, kind=kind))
    sizes = engine.config.training.global_batch_size, engine.config.data.seq_length, engine.config.model.vocab_size
    batches = micro_batches(engine, masked_batch(0, *sizes) if kind == "bert" else global_batch(0, *sizes, "full"))
    sums, counts = evaluate_step(engine, batches)
    metrics = train_step(engine, batches)
    evaluated, trained = (
        dict(zip(engine.task.term_names, losses.tolist(), strict=True)) for losses in (sums / counts, metrics.losses)
    )
    return float(metrics.grad_norm), evaluated, trained
