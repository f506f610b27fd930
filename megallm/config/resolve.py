"""The values that follow from others: what a field left at None stands for."""

from __future__ import annotations

from dataclasses import replace

from megallm.config.batch_sizes import BatchSizes, batch_sizes_of
from megallm.config.report import counted
from megallm.config.tree import Config, ModelConfig, ParallelConfig

PROGRAMS = {"gpt": "pretrain_gpt.py", "bert": "pretrain_bert.py"}
"""What trains a model of each architecture."""

GATED_ACTIVATIONS = ("swiglu", "geglu")
"""Activations whose MLP has a gate matrix beside the up matrix."""


def resolve(config: Config, world_size: int, tokenizer_vocab_size: int | None = None) -> Config:
    """`config` with every derived default filled in, for `world_size` processes.

    Fields that are given stay as they are, so resolving twice changes nothing. `vocab_size` stays None where neither
    the configuration nor the tokenizer (`tokenizer_vocab_size` entries) gives it; a given size may exceed the
    tokenizer's. Raises ValueError where a default cannot be derived, each of which `megallm.plan.validate` explains
    with all other problems of the configuration.
    """
    model, parallel, training, optimizer = config.model, config.parallel, config.training, config.optimizer
    replicas = data_parallel_size(parallel, world_size)
    batch_sizes = resolved_batch_sizes(config, world_size)
    # The decay's default follows the unit of the run's length.
    decay_iters, decay_samples = optimizer.lr_decay_iters, optimizer.lr_decay_samples
    if decay_iters is None and decay_samples is None:
        decay_samples = training.train_samples
        decay_iters = None if decay_samples is not None else training.train_iters
    return replace(
        config,
        model=replace(
            model,
            ffn_hidden_size=ffn_hidden_size(model),
            num_query_groups=num_query_groups(model),
            kv_channels=kv_channels(model),
            max_position_embeddings=_given(model.max_position_embeddings, config.data.seq_length),
            num_token_types=_resolved_token_types(model),
            vocab_size=_vocab_size(model, tokenizer_vocab_size),
        ),
        parallel=replace(
            parallel,
            pipeline_schedule=pipeline_schedule(parallel),
            ddp_bucket_size=_given(parallel.ddp_bucket_size, max(40_000_000, 1_000_000 * replicas)),
        ),
        training=replace(
            training,
            global_batch_size=_given(training.global_batch_size, batch_sizes.largest),
            train_iters=train_iters(config, batch_sizes),
        ),
        optimizer=replace(optimizer, lr_decay_iters=decay_iters, lr_decay_samples=decay_samples),
    )


def resolved_batch_sizes(config: Config, world_size: int) -> BatchSizes:
    """The sizes of all global batches; by default a micro-batch on each data parallel rank.

    Raises ValueError where the flags give none, or the layout does not come out even.
    """
    training = config.training
    if training.global_batch_size is None:
        size = training.micro_batch_size * data_parallel_size(config.parallel, world_size)
        config = replace(config, training=replace(training, global_batch_size=size))
    return batch_sizes_of(config)


def train_iters(config: Config, batch_sizes: BatchSizes) -> int:
    """Number of steps: as given, or as many as --train-samples has whole batches for."""
    training = config.training
    return training.train_iters or batch_sizes.steps_within(training.train_samples or 0)


def train_samples(config: Config, batch_sizes: BatchSizes) -> int:
    """Training samples that a run asks its data for: as given, or those of all its steps."""
    return _given(config.training.train_samples, batch_sizes.after(config.training.train_iters))


def learning_rate_warmup_samples(config: Config, batch_sizes: BatchSizes) -> float:
    """Length of the learning rate's warm-up in samples, not always whole where it is a part of the decay."""
    settings = config.optimizer
    if settings.lr_warmup_fraction is not None:
        return settings.lr_warmup_fraction * learning_rate_decay_samples(config, batch_sizes)
    return settings.lr_warmup_samples or batch_sizes.after(settings.lr_warmup_iters)


def learning_rate_decay_samples(config: Config, batch_sizes: BatchSizes) -> int:
    """Samples at which the learning rate is at its minimum; by default those of the whole run."""
    settings = config.optimizer
    if settings.lr_decay_samples is not None:
        return settings.lr_decay_samples
    if settings.lr_decay_iters is not None:
        return batch_sizes.after(settings.lr_decay_iters)
    return train_samples(config, batch_sizes)


def wsd_decay_samples(config: Config, batch_sizes: BatchSizes) -> int:
    """Samples of the decay at the end of WSD: as given, or those of the last steps before the decay ends."""
    settings = config.optimizer
    if settings.lr_wsd_decay_samples is not None or settings.lr_wsd_decay_iters is None:
        return settings.lr_wsd_decay_samples or 0
    end = learning_rate_decay_samples(config, batch_sizes)
    return end - batch_sizes.after(max(0, batch_sizes.steps_within(end) - settings.lr_wsd_decay_iters))


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of the model among `world_size` processes. Raises ValueError where they do not come out even."""
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if model_parallel < 1 or world_size < 1 or world_size % model_parallel:
        raise ValueError(
            f"{counted(world_size, 'process', 'processes')} cannot be laid out: a copy of the model takes "
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} = {model_parallel} of them; "
            f"start a multiple of {model_parallel}."
        )
    return world_size // model_parallel


def ffn_hidden_size(model: ModelConfig) -> int:
    """Width inside the MLP: as given, or 4 x hidden, or for gated activations 8/3 x hidden cut to a multiple of 64.

    Three matrices of 8/3 x hidden hold as much as two of 4 x hidden.
    """
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if model.activation in GATED_ACTIVATIONS:
        return model.hidden_size * 8 // 3 // 64 * 64
    return 4 * model.hidden_size


def num_query_groups(model: ModelConfig) -> int:
    """Number of key/value heads: as given, or as many as query heads."""
    return _given(model.num_query_groups, model.num_attention_heads)


def loss_chunk_size(config: Config) -> int | None:
    """Tokens of a micro-batch whose logits exist at once, or None for all of them."""
    size, tokens = config.training.loss_chunk_size, config.training.micro_batch_size * config.data.seq_length
    return size if 0 < size < tokens else None


def kv_channels(model: ModelConfig) -> int:
    """Width of one attention head: as given, or hidden / heads. Raises ValueError where that is not whole."""
    if model.kv_channels is not None:
        return model.kv_channels
    if model.num_attention_heads < 1 or model.hidden_size % model.num_attention_heads:
        raise ValueError(
            f"--hidden-size {model.hidden_size} does not divide by --num-attention-heads {model.num_attention_heads}; "
            "give a multiple, or the width of a head with --kv-channels."
        )
    return model.hidden_size // model.num_attention_heads


def num_token_types(model: ModelConfig) -> int:
    """Rows of the table of token types: as given, or of a BERT as many as a sample has texts that are told apart."""
    if model.architecture == "gpt":
        return 0
    return _given(model.num_token_types, 2 if model.bert_binary_head else 0)


def _resolved_token_types(model: ModelConfig) -> int | None:
    # A decoder has no such table: there is nothing to fill in, and nothing that a saved configuration would lack.
    return model.num_token_types if model.architecture == "gpt" else num_token_types(model)


def rotary_width(model: ModelConfig) -> int:
    """Channels of a head that rotary positions turn. Raises ValueError where the width of a head is not whole."""
    return int(kv_channels(model) * model.rotary_percent)


def attention_window(model: ModelConfig) -> int | None:
    """Positions before its own that a token of a decoder may look at; None for all.

    Raises ValueError with a sentence where --window-size says something else than that.
    """
    if model.window_size is None:
        return None
    words = model.window_size.strip("()").split(",")
    try:
        left, right = (int(word) for word in words)
    except ValueError:
        raise ValueError(f"{model.window_size!r} is not two whole numbers with a comma between them") from None
    if left < -1:
        raise ValueError(f"{left} positions to the left are fewer than none, and -1 stands for all")
    if right not in (0, -1):
        raise ValueError(f"{right} positions to the right cannot be looked at before they are there")
    return None if left == -1 else left


def pipeline_schedule(parallel: ParallelConfig) -> str:
    """The schedule by name; "auto" becomes "interleaved" with virtual stages and "1f1b" without."""
    if parallel.pipeline_schedule != "auto":
        return parallel.pipeline_schedule
    return "interleaved" if parallel.num_virtual_stages_per_pipeline_rank > 1 else "1f1b"


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _vocab_size(model: ModelConfig, tokenizer_vocab_size: int | None) -> int | None:
    given = model.vocab_size
    if given is not None and tokenizer_vocab_size is not None and given < tokenizer_vocab_size:
        raise ValueError(
            f"--vocab-size {given} is smaller than the tokenizer's {tokenizer_vocab_size} entries, whose highest "
            f"tokens would have no embedding; leave it out or give at least {tokenizer_vocab_size}."
        )
    return tokenizer_vocab_size if given is None else given
