"""What an evaluation leaves for those that come after it."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import Mock

from megallm.data.samples.mock import MockDataset
from megallm.train.datasets import Datasets
from megallm.train.evaluation import Evaluation
from megallm.train.stopping import NOTHING, Wish
from tests.distributed.parity import LLAMA, Case, make_engine


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
