"""The data of a run: tokenizer and datasets as the configuration names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megallm.config import resolve
from megallm.config.batch_sizes import batch_sizes_of
from megallm.config.data_sources import read_sources
from megallm.config.report import counted
from megallm.config.resolve import train_samples
from megallm.config.tree import Config
from megallm.data.feeding.loader import SampleSource
from megallm.data.samples.bert import BERTDatasetSettings
from megallm.data.samples.blended import BlendedDataset, BuildOptions, Part, Settings, build_run_data
from megallm.data.samples.content import content_digest
from megallm.data.samples.gpt import GPTDatasetSettings
from megallm.data.samples.masking import masking_vocabulary
from megallm.data.samples.mock import MockDataset, MockMaskedDataset
from megallm.data.samples.t5 import T5DatasetSettings
from megallm.data.tokenizer.base import Tokenizer, state_special_tokens
from megallm.data.tokenizer.build import build_tokenizer, settings_of
from megallm.data.tokenizer.record import check_records, describe
from megallm.plan.rules_data import data_sources


@dataclass(frozen=True)
class Datasets:
    """The data of a run.

    Attributes:
        train: what is trained on.
        valid: what is evaluated on, by name ("" where there is one); empty if the run does not evaluate.
        test: what is evaluated on at the end, or None.
        notes: what the user should know about them.
        tokenizer: the checksum of the tokenizer, empty where there is none.
        content: a digest of what the files of the training data hold, empty where there are none.
        num_valid_samples: what the indices of the validation data were asked for; None where it is read whole or not.
    """

    train: SampleSource
    valid: dict[str, SampleSource]
    test: SampleSource | None = None
    notes: tuple[str, ...] = ()
    tokenizer: str = ""
    content: str = ""
    num_valid_samples: int | None = None


def build_tokenizer_of(config: Config) -> Tokenizer | None:
    """The run's tokenizer; None for mock data that names none or NullTokenizer, whose vocabulary is --vocab-size.

    Raises ValueError for a tokenizer that cannot be read.
    """
    data = config.data
    if data.tokenizer_type is None or (data.mock_data and data.tokenizer_type == "NullTokenizer"):
        return None
    return build_tokenizer(settings_of(data, config.model.vocab_size))


def with_vocabulary(config: Config, tokenizer: Tokenizer | None, world_size: int) -> Config:
    """`config` with the size of the vocabulary settled: --vocab-size, or the tokenizer's where that is not given.

    Raises ValueError if --vocab-size leaves out some of the tokenizer's tokens.
    """
    if tokenizer is not None and config.data.tokenizer_type == "NullTokenizer":
        # The flag may count the tokens without the end of document, which the tokenizer then adds. Said outright, the
        # configuration that the run saves means the same when it is read again.
        data = replace(config.data, null_tokenizer_eod_id=tokenizer.eod_id)
        config = replace(config, model=replace(config.model, vocab_size=None), data=data)
    return resolve(config, world_size, tokenizer.vocab_size if tokenizer is not None else None)


def build_datasets(
    config: Config,
    tokenizer: Tokenizer | None,
    on_dataset: Callable[[], None] = lambda: None,
    decoder_seq_length: int | None = None,
) -> Datasets:
    """Training, validation and test data of the model's architecture, with as many samples as the run takes.

    With `decoder_seq_length` the samples are those of a T5, whose decoder sees so many tokens.

    Raises ValueError if a file is missing, broken or too small, or the tokenizer lacks a token that the samples need.
    `on_dataset` is called after each dataset of a blend.
    """
    training, data = config.training, config.data
    batch, vocab_size = training.global_batch_size, config.model.vocab_size
    assert batch and vocab_size, "the configuration is resolved"
    num_train = train_samples(config, batch_sizes_of(config))
    # One evaluation more than the interval asks for, as Megatron counts: the indices are then the same.
    evaluations = training.train_iters // training.eval_interval + 1 if training.eval_interval else 0
    num_valid, num_test = (count * training.eval_iters * batch for count in (evaluations, min(evaluations, 1)))
    if data.mock_data:
        train, valid = (_mock_data(config, size, number) for number, size in enumerate((num_train, num_valid)))
        return Datasets(train, {"": valid} if num_valid else {})
    sources = data_sources(config)
    prefixes = list(dict.fromkeys(prefix for source in read_sources(sources) if source for prefix in source.prefixes))
    if tokenizer is not None:
        check_records(prefixes, tokenizer)
    options = BuildOptions(
        mmap=data.mmap_bin_files,
        multiple_validation_sets=data.multiple_validation_sets,
        drop_last_partial_validation_sequence=data.drop_last_partial_validation_sequence,
        num_threads=data.num_dataset_builder_threads,
        surplus=data.mid_level_dataset_surplus,
        on_dataset=on_dataset,
    )
    sizes = num_train, None if num_valid and data.full_validation else num_valid, num_test
    settings = _settings(config, tokenizer, prefixes[0], decoder_seq_length)
    built = build_run_data(settings, sources, sizes, options)
    if built.train is None:
        raise ValueError("There is no training data: --split, or the lists of data, leave it none.")
    if num_valid and not built.valid:
        raise ValueError("--eval-interval asks for evaluations, but there is no validation data.")
    test, without_test = built.test, built.without_test
    if test is not None and len(test) < batch:
        without_test = f"it has {len(test)} samples, fewer than one global batch of {batch}"
        test = None
    notes = [f"special tokens: {state_special_tokens(tokenizer)}"] if tokenizer is not None else []
    if config.model.architecture == "gpt" and decoder_seq_length is None:
        notes += _sentences_noted(built.train)
    if without_test:
        notes.append(f"no evaluation on test data: {without_test}")
    checksum = describe(tokenizer)["checksum"] if tokenizer else ""
    return Datasets(
        built.train, dict(built.valid), test, tuple(notes), checksum, _content(built.train), sizes[1] or None
    )


def _content(train: Part | BlendedDataset) -> str:
    parts = _parts(train)
    return content_digest((part.indexed_dataset for part in parts), len(parts))


def _parts(train: Part | BlendedDataset) -> Sequence[Part]:
    return train.datasets if isinstance(train, BlendedDataset) else [train]


def _sentences_noted(train: Part | BlendedDataset) -> list[str]:
    """A sentence on the first dataset whose documents are in pieces: a language model's samples tear them apart."""
    for indexed in (part.indexed_dataset for part in _parts(train)):
        if len(indexed) > indexed.num_documents:
            return [
                f"{indexed.path_prefix} has {counted(indexed.num_documents, 'document')} in {len(indexed):,} pieces, "
                "as --split-sentences makes them for BERT: each piece is taken for a document of its own, and the text "
                "around it is lost; make the data again without --split-sentences to learn from whole documents"
            ]
    return []


def _mock_data(config: Config, num_samples: int, number: int) -> SampleSource:
    """Synthetic data, other data for each number."""
    length, vocab_size, seed = config.data.seq_length, config.model.vocab_size, config.training.seed + number
    assert vocab_size, "the configuration is resolved"
    if config.model.architecture == "bert":
        return MockMaskedDataset(num_samples, length, vocab_size, seed, config.data.mask_prob)
    return MockDataset(num_samples, length, vocab_size, seed)


def _settings(
    config: Config, tokenizer: Tokenizer | None, first_prefix: str, decoder_seq_length: int | None
) -> Settings:
    if decoder_seq_length is not None:
        return T5DatasetSettings(
            **_masked_settings(config, tokenizer),
            cache_path=_cache_path(config, first_prefix, "T5MaskedWordPieceDataset"),
            decoder_sequence_length=decoder_seq_length,
        )
    if config.model.architecture == "bert":
        return BERTDatasetSettings(
            **_masked_settings(config, tokenizer),
            cache_path=_cache_path(config, first_prefix, "BERTMaskedWordPieceDataset"),
            next_sentence=config.model.bert_binary_head,
        )
    return _gpt_settings(config, tokenizer, first_prefix)


def _gpt_settings(config: Config, tokenizer: Tokenizer | None, first_prefix: str) -> GPTDatasetSettings:
    data = config.data
    eod_id = pad_id = None
    if tokenizer is not None:
        eod_id, pad_id = tokenizer.eod_id, tokenizer.pad_id
        others = [number for role, number in tokenizer.special_tokens().items() if role != "padding"]
        if pad_id in others or pad_id in tokenizer.sentinel_ids:
            # A token that means something is learned, as with Megatron.
            pad_id = None
    return GPTDatasetSettings(
        sequence_length=data.seq_length,
        seed=config.training.seed,
        vocab_size=config.model.vocab_size,
        eod_id=eod_id,
        pad_id=pad_id,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        cache_path=_cache_path(config, first_prefix, "GPTDataset"),
    )


def _masked_settings(config: Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What the samples of BERT and T5 have in common."""
    if tokenizer is None:
        raise ValueError("Masking needs a tokenizer, whose special tokens it uses: give --tokenizer-type.")
    return {
        "sequence_length": config.data.seq_length,
        "vocabulary": masking_vocabulary(tokenizer),
        "seed": config.training.seed,
        "masking_probability": config.data.mask_prob,
        "short_sequence_probability": config.data.short_seq_prob,
    }


def _cache_path(config: Config, first_prefix: str, dataset: str) -> str:
    """The folder of the indices: --data-cache-path, or Megatron's place for a class of its datasets."""
    return config.data.data_cache_path or str(Path(first_prefix).parent / "cache" / f"{dataset}_indices")
