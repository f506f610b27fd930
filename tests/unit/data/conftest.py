"""Fixtures: a dataset with known indices, small tokenizers, and a way to call the tools."""

import pytest
from small_data import GOLDEN_DOCUMENTS, TEXTS, load_tool, write_dataset

from megallm.data.tokenizer.training import TrainingSettings, train_tokenizer


@pytest.fixture
def golden(tmp_path):
    return write_dataset(tmp_path / "golden", GOLDEN_DOCUMENTS)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    """A byte-level tokenizer.json of 300 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_tokenizer(TrainingSettings("bpe", 300), TEXTS * 5, path).content)
    return path


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """A SentencePiece BPE model of 300 pieces with byte fallback."""
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("tokenizer") / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(TEXTS).split("\n") * 3),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        character_coverage=0.99,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def tool(capsys):
    """Calls a tool; gives its exit code, what it printed, and its message on the error stream."""

    def call(name, *arguments):
        code = 0
        try:
            load_tool(name).main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
