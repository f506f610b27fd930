"""Rules about single values: those that must be given, and the range each may have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megallm.config.fields import REQUIRED, Field, all_fields, nearest_hint
from megallm.config.tree import Config
from megallm.plan.problem import Problem, rule

_EXAMPLES = {
    "model.num_layers": "--num-layers 12",
    "model.hidden_size": "--hidden-size 768",
    "model.num_attention_heads": "--num-attention-heads 12",
    "training.micro_batch_size": "--micro-batch-size 1",
    "training.train_iters": "--train-iters 1000",
    "optimizer.lr": "--lr 3e-4",
    "data.seq_length": "--seq-length 1024",
    "data.tokenizer_type": "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json",
}


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, each end included unless it is open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        # Whole ends are written out: 4294967295 must not become 4.29497e+09.
        high = f"{self.high:.0f}" if float(self.high).is_integer() else f"{self.high:g}"
        return f"{low} and " + (f"below {high}" if self.high_open else f"at most {high}")


_COUNT = Range(1)
_NATURAL = Range(0)
_POSITIVE = Range(0, low_open=True)
_PROBABILITY = Range(0, 1, high_open=True)

RANGES = {
    "model.num_layers": _COUNT,
    "model.hidden_size": _COUNT,
    "model.ffn_hidden_size": _COUNT,
    "model.num_attention_heads": _COUNT,
    "model.num_query_groups": _COUNT,
    "model.kv_channels": _COUNT,
    "model.max_position_embeddings": _COUNT,
    "model.rotary_base": _POSITIVE,
    "model.rotary_percent": Range(0, 1, low_open=True),
    "model.rotary_seq_len_interpolation_factor": _POSITIVE,
    "model.rope_scaling_factor": _POSITIVE,
    "model.rope_scaling_low_freq_factor": _POSITIVE,
    "model.rope_scaling_high_freq_factor": _POSITIVE,
    "model.rope_scaling_original_length": _COUNT,
    "model.norm_epsilon": _POSITIVE,
    "model.num_token_types": _NATURAL,
    "model.attention_dropout": _PROBABILITY,
    "model.hidden_dropout": _PROBABILITY,
    "model.init_method_std": _NATURAL,
    "model.embedding_init_method_std": _NATURAL,
    "model.vocab_size": _COUNT,
    "model.make_vocab_size_divisible_by": _COUNT,
    "parallel.tensor_model_parallel_size": _COUNT,
    "parallel.pipeline_model_parallel_size": _COUNT,
    "parallel.num_virtual_stages_per_pipeline_rank": _COUNT,
    "parallel.microbatch_group_size_per_virtual_pipeline_stage": _COUNT,
    "parallel.decoder_first_pipeline_num_layers": _COUNT,
    "parallel.decoder_last_pipeline_num_layers": _COUNT,
    "parallel.ddp_bucket_size": _COUNT,
    "parallel.distributed_timeout_minutes": _POSITIVE,
    "training.micro_batch_size": _COUNT,
    "training.global_batch_size": _COUNT,
    "training.train_iters": _COUNT,
    "training.train_samples": _COUNT,
    "training.eval_interval": _COUNT,
    "training.eval_iters": _NATURAL,
    "training.manual_gc_interval": _NATURAL,
    "training.exit_interval": _COUNT,
    "training.exit_duration_in_mins": _POSITIVE,
    "training.recompute_num_layers": _COUNT,
    "training.loss_chunk_size": _NATURAL,
    "training.label_smoothing": _PROBABILITY,
    "training.z_loss_coeff": _NATURAL,
    "training.loss_scale": _POSITIVE,
    "training.initial_loss_scale": _POSITIVE,
    "training.min_loss_scale": _POSITIVE,
    "training.loss_scale_window": _COUNT,
    "training.hysteresis": _COUNT,
    # numpy's generator, which orders the data, takes seeds of 32 bits.
    "training.seed": Range(0, 2**32 - 1),
    "optimizer.lr": _POSITIVE,
    "optimizer.min_lr": _NATURAL,
    "optimizer.decoupled_lr": _POSITIVE,
    "optimizer.decoupled_min_lr": _NATURAL,
    "optimizer.lr_decay_iters": _COUNT,
    "optimizer.lr_decay_samples": _COUNT,
    "optimizer.lr_warmup_iters": _NATURAL,
    "optimizer.lr_warmup_samples": _NATURAL,
    "optimizer.lr_warmup_fraction": _PROBABILITY,
    "optimizer.lr_warmup_init": _NATURAL,
    "optimizer.lr_wsd_decay_iters": _COUNT,
    "optimizer.lr_wsd_decay_samples": _COUNT,
    "optimizer.weight_decay": _NATURAL,
    "optimizer.start_weight_decay": _NATURAL,
    "optimizer.end_weight_decay": _NATURAL,
    "optimizer.adam_beta1": _PROBABILITY,
    "optimizer.adam_beta2": _PROBABILITY,
    "optimizer.adam_eps": _POSITIVE,
    "optimizer.sgd_momentum": _PROBABILITY,
    "optimizer.clip_grad": _NATURAL,
    "data.seq_length": _COUNT,
    "data.mask_prob": Range(0, 1, low_open=True, high_open=True),
    "data.short_seq_prob": Range(0, 1),
    "data.vocab_extra_ids": _NATURAL,
    "data.null_tokenizer_eod_id": _NATURAL,
    "data.tiktoken_num_special_tokens": _NATURAL,
    "data.num_workers": _NATURAL,
    "data.num_dataset_builder_threads": _COUNT,
    "data.mid_level_dataset_surplus": _NATURAL,
    "checkpoint.save_interval": _COUNT,
    "checkpoint.save_hf_interval": _COUNT,
    "checkpoint.ckpt_step": _COUNT,
    "checkpoint.non_persistent_save_interval": _COUNT,
    "checkpoint.save_retain_interval": _COUNT,
    # One of them may turn out to be damaged.
    "checkpoint.save_keep_last": Range(2),
    "logging.log_interval": _COUNT,
    "logging.sample_interval": _COUNT,
    "logging.sample_num_tokens": _COUNT,
    "logging.tensorboard_log_interval": _COUNT,
    "logging.tensorboard_queue_size": _COUNT,
    "logging.timing_log_level": Range(0, 2),
    "logging.profile_step_start": _NATURAL,
    "logging.profile_step_end": _COUNT,
    "logging.timeline_step": _COUNT,
    "plan.world_size": _COUNT,
}
"""The range of every number of the tree."""


@rule()
def required_value_is_given(config: Config, world_size: int) -> Iterator[Problem]:
    """Values that nobody can choose for the user."""
    for entry in all_fields():
        if entry.path == "training.train_iters" and config.training.train_samples is not None:
            continue
        if entry.path in REQUIRED and _missing(config, entry):
            yield Problem((entry.flag,), f"{entry.help}: not given", "", f"for example {_EXAMPLES[entry.path]}")


@rule()
def number_is_in_range(config: Config, world_size: int) -> Iterator[Problem]:
    """Counts that are not positive, probabilities above one, infinities and the like."""
    for entry in all_fields():
        if entry.path not in RANGES or _missing(config, entry):
            continue
        value, allowed = entry.of(config), RANGES[entry.path]
        if value is not None and value not in allowed:
            near = f"{entry.flag} {_nearest(entry, value, allowed)}"
            finite = "" if math.isfinite(value) else "a finite number, "
            yield Problem(
                (entry.flag,), f"{value} is out of range", "", f"it must be {finite}{allowed}, such as {near}"
            )


@rule()
def text_is_a_choice(config: Config, world_size: int) -> Iterator[Problem]:
    """Names that are none of the known ones."""
    for entry in all_fields():
        value = entry.of(config)
        if entry.choices is not None and value is not None and value not in entry.choices:
            known = ", ".join(map(str, entry.choices))
            near = nearest_hint(str(value), map(str, entry.choices))
            yield Problem((entry.flag,), f"{value} is not known", "", f"use one of {entry.flag} {known}{near}")


def broken_paths(problems: list[Problem]) -> set[str]:
    """The fields that the problems of this file concern."""
    flags = {flag for problem in problems for flag in problem.flags}
    return {entry.path for entry in all_fields() if entry.flag in flags}


def _missing(config: Config, entry: Field) -> bool:
    return entry.path in REQUIRED and entry.of(config) in (0, None)


def _nearest(entry: Field, value: float, allowed: Range) -> object:
    """A value in the range near the one given: the end that it lies beyond, the default where that end is open."""
    if value > allowed.high or (value == allowed.high and allowed.high_open):
        end, is_open = allowed.high, allowed.high_open
    else:
        end, is_open = allowed.low, allowed.low_open
    if not is_open and math.isfinite(end):
        return int(end) if entry.kind is int else float(end)
    return entry.default if isinstance(entry.default, float) and entry.default in allowed else 1e-4
