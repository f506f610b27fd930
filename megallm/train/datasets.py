"""The data of a run: tokenizer and datasets as the configuration names them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megallm.config import resolve
from megallm.config.batch_sizes import batch_sizes_of
from megallm.config.resolve import train_samples
from megallm.config.tree import Config
from megallm.data.feeding.loader import SampleSource
from megallm.data.samples.blended import build_run_data
from megallm.data.samples.gpt import GPTDatasetSettings
from megallm.data.samples.mock import MockDataset
from megallm.data.samples.splits import DataSources, read_sources
from megallm.data.tokenizer.base import Tokenizer, TokenizerSettings
from megallm.data.tokenizer.build import build_tokenizer
from megallm.data.tokenizer.record import check_record


@dataclass(frozen=True)
class Datasets:
    """Training data, and validation data if the run evaluates."""

    train: SampleSource
    valid: SampleSource | None


def build_tokenizer_of(config: Config) -> Tokenizer | None:
    """The run's tokenizer; None for mock data that names none or NullTokenizer, whose vocabulary is --vocab-size.

    Raises ValueError for a tokenizer that cannot be read.
    """
    data = config.data
    if data.tokenizer_type is None or (data.mock_data and data.tokenizer_type == "NullTokenizer"):
        return None
    return build_tokenizer(
        TokenizerSettings(
            data.tokenizer_type,
            data.tokenizer_model,
            vocab_file=data.vocab_file,
            merge_file=data.merge_file,
            vocab_size=config.model.vocab_size,
            vocab_extra_ids=data.vocab_extra_ids,
            tokenizer_sentencepiece_legacy=data.tokenizer_sentencepiece_legacy,
            null_tokenizer_eod_id=data.null_tokenizer_eod_id,
            tiktoken_pattern=data.tiktoken_pattern,
            tiktoken_num_special_tokens=data.tiktoken_num_special_tokens,
            tiktoken_special_tokens=tuple(data.tiktoken_special_tokens) or None,
        )
    )


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


def build_datasets(config: Config, tokenizer: Tokenizer | None) -> Datasets:
    """Training and validation data with as many samples as the run takes.

    Raises ValueError if a file is missing, broken or too small.
    """
    training, data = config.training, config.data
    batch, vocab_size = training.global_batch_size, config.model.vocab_size
    assert batch and vocab_size, "the configuration is resolved"
    num_train = train_samples(config, batch_sizes_of(config))
    # One evaluation more than the interval asks for, as Megatron counts: the indices are then the same.
    evaluations = training.train_iters // training.eval_interval + 1 if training.eval_interval else 0
    valid_samples = evaluations * training.eval_iters * batch
    if data.mock_data:
        seeds = training.seed, training.seed + 1
        train, valid = (
            MockDataset(size, data.seq_length, vocab_size, seed)
            for size, seed in zip((num_train, valid_samples), seeds, strict=True)
        )
        return Datasets(train, valid if valid_samples else None)
    sources = DataSources(data_path=tuple(data.data_path), split=data.split)
    prefixes = list(dict.fromkeys(prefix for source in read_sources(sources) if source for prefix in source.prefixes))
    if tokenizer is not None:
        for prefix in prefixes:
            check_record(prefix, tokenizer)
    cache = data.data_cache_path
    if cache is None:
        cache = str(Path(prefixes[0]).parent / "cache" / "GPTDataset_indices")
    settings = GPTDatasetSettings(
        sequence_length=data.seq_length,
        seed=training.seed,
        vocab_size=vocab_size,
        eod_id=tokenizer.eod_id if tokenizer is not None else None,
        pad_id=tokenizer.pad_id if tokenizer is not None else None,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        cache_path=cache,
    )
    built = build_run_data(settings, sources, (num_train, valid_samples, 0))
    if built.train is None:
        raise ValueError(f"--split {data.split!r} leaves no training data")
    return Datasets(built.train, next(iter(built.valid.values()), None))
