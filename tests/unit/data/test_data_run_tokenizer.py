"""The tokenizer of a run: built as configured, held against the data, the same when saved and read again."""

from dataclasses import replace

import pytest
from small_data import write_dataset

from megallm.config.tree import Config
from megallm.data.indexed.format import token_dtype
from megallm.data.indexed.writer import IndexedDatasetWriter
from megallm.data.tokenizer.base import TokenizerSettings
from megallm.data.tokenizer.build import TOKENIZER_TYPES, build_tokenizer
from megallm.data.tokenizer.record import describe, write_record
from megallm.data.tokenizer.tiktoken import PATTERNS
from megallm.train.datasets import build_datasets, build_tokenizer_of, with_vocabulary


def config_of(vocab_size=None, **data):
    plain = Config()
    return replace(
        plain,
        model=replace(plain.model, num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=vocab_size),
        training=replace(plain.training, micro_batch_size=1, global_batch_size=1, train_iters=2, eval_interval=None),
        data=replace(plain.data, seq_length=2, split="1,0,0", **data),
    )


def resolved(config):
    tokenizer = build_tokenizer_of(config)
    return with_vocabulary(config, tokenizer, 1), tokenizer


def test_the_saved_configuration_of_null_tokenizer_means_the_same_again():
    config, tokenizer = resolved(config_of(100, tokenizer_type="NullTokenizer"))
    assert (config.model.vocab_size, tokenizer.eod_id) == (101, 100)
    again, tokenizer = resolved(config)
    assert again == config
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (101, 100)


def test_data_of_another_tokenizer_is_refused(tmp_path, tokenizer_json):
    prefix = str(tmp_path / "data")
    write_dataset(prefix, [[5, 6, 7, 0]] * 10)
    maker = build_tokenizer(TokenizerSettings("HuggingFaceTokenizer", str(tokenizer_json)))
    other, _ = resolved(config_of(100, tokenizer_type="NullTokenizer", data_path=[prefix]))
    same, _ = resolved(
        config_of(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_json), data_path=[prefix])
    )
    assert len(build_datasets(other, build_tokenizer_of(other)).train) >= 2
    write_record(prefix, describe(maker))
    with pytest.raises(ValueError, match="data was made with another tokenizer than this run's"):
        build_datasets(other, build_tokenizer_of(other))
    assert "special tokens: end of document <|endoftext|> = 0" in build_datasets(same, build_tokenizer_of(same)).notes


def test_a_language_model_is_told_that_its_documents_are_in_sentences(tmp_path):
    def notes(**lengths):
        prefix = str(tmp_path / "data")
        with IndexedDatasetWriter(prefix, token_dtype(100)) as writer:
            for _ in range(10):
                writer.add_document([5, 6, 7, 8], **lengths)
        config, tokenizer = resolved(config_of(100, tokenizer_type="NullTokenizer", data_path=[prefix]))
        return " ".join(build_datasets(config, tokenizer).notes)

    assert "pieces" not in notes()
    assert f"{tmp_path}/data has 10 documents in 20 pieces, as --split-sentences makes" in notes(
        sequence_lengths=[2, 2]
    )


def test_flags_name_what_there_is():
    fields = Config().data.__dataclass_fields__
    assert fields["tokenizer_type"].metadata["choices"] == TOKENIZER_TYPES
    assert fields["tiktoken_pattern"].metadata["choices"] == tuple(PATTERNS)
