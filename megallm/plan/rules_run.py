"""Rules about the course of a run: precision, length, evaluation, saving, and its data."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.config.operators import parse_choices
from megallm.config.resolve import train_iters
from megallm.config.tree import Config
from megallm.plan.problem import Problem, rule
from megallm.plan.rules_batches import BATCH_SIZE_FIELDS, batch_sizes_or_none

RECOMPUTED_MODULES = ("core_attn", "mlp")
"""Modules of a layer that selective recomputation knows."""


@rule()
def one_precision(config: Config, world_size: int) -> Iterator[Problem]:
    """A run has one precision."""
    training = config.training
    choices = {"--bf16": training.bf16, "--fp16": training.fp16, "--fp64": training.fp64}
    flags = tuple(flag for flag, is_given in choices.items() if is_given)
    if len(flags) > 1:
        yield Problem(
            flags,
            f"{len(flags)} precisions are asked for",
            "",
            f"leave out {' or '.join(flags)}; without any of them the run is in float32",
        )


@rule()
def operators_are_known(config: Config, world_size: int) -> Iterator[Problem]:
    """Operators and their implementations have the names that there are."""
    try:
        parse_choices(config.training.ops)
    except ValueError as error:
        wrong, _, way_out = str(error).partition("; ")
        yield Problem(("--ops",), wrong, "", way_out)


@rule("training.recompute_method")
def recompute_settings_act(config: Config, world_size: int) -> Iterator[Problem]:
    """Settings of one granularity of recomputation under another would change nothing, in silence."""
    training = config.training
    of_full = {
        "--recompute-method": training.recompute_method != "uniform",
        "--recompute-num-layers": training.recompute_num_layers != 1,
    }
    for_full = tuple(flag for flag, given in of_full.items() if given)
    for_selective = ("--recompute-modules",) if training.recompute_modules != ["core_attn"] else ()
    for wanted, flags in (("full", for_full), ("selective", for_selective)):
        if flags and training.recompute_granularity != wanted:
            present = training.recompute_granularity or "none"
            yield Problem(
                (*flags, "--recompute-granularity"),
                f"what is computed again is chosen for {wanted} granularity, but there is {present}",
                "",
                f"add --recompute-granularity {wanted}, or leave out {' and '.join(flags)}",
            )


@rule()
def recomputed_modules_are_known(config: Config, world_size: int) -> Iterator[Problem]:
    """Modules that can be computed again by themselves."""
    unknown = [module for module in config.training.recompute_modules if module not in RECOMPUTED_MODULES]
    if unknown or not config.training.recompute_modules:
        yield Problem(
            ("--recompute-modules",),
            f"{' '.join(unknown) or 'nothing'} cannot be computed again by itself",
            "",
            f"use --recompute-modules {' '.join(RECOMPUTED_MODULES)}, or one of them",
        )


@rule("training.initial_loss_scale", "training.min_loss_scale")
def loss_scale_starts_above_its_minimum(config: Config, world_size: int) -> Iterator[Problem]:
    """The loss scale goes down from its start to its minimum."""
    start, minimum = config.training.initial_loss_scale, config.training.min_loss_scale
    if minimum > start:
        yield Problem(
            ("--min-loss-scale", "--initial-loss-scale"),
            "the loss scale would start below its minimum",
            f"{minimum} > {start}",
            f"use --min-loss-scale {start} or less, or --initial-loss-scale {minimum} or more",
        )


@rule("training.train_iters", "training.train_samples", *BATCH_SIZE_FIELDS)
def one_length_of_the_run(config: Config, world_size: int) -> Iterator[Problem]:
    """The run has at least one step, and a length in samples is that in steps where both are given."""
    training, sizes = config.training, batch_sizes_or_none(config, world_size)
    if sizes is None or training.train_samples is None:
        return
    steps = sizes.steps_within(training.train_samples)
    if steps == 0:
        yield Problem(
            ("--train-samples",),
            f"{training.train_samples} samples do not fill the first batch",
            f"{training.train_samples} < {sizes.at(0)}",
            f"use --train-samples {sizes.at(0)} or more",
        )
    elif training.train_iters not in (0, steps):
        yield Problem(
            ("--train-iters", "--train-samples"),
            f"{training.train_samples} samples are {steps} steps, not {training.train_iters}",
            "",
            "leave out --train-iters",
        )


@rule("training.eval_interval", "training.eval_iters")
def evaluation_has_batches(config: Config, world_size: int) -> Iterator[Problem]:
    """An evaluation takes at least one batch."""
    interval = config.training.eval_interval
    if interval is not None and config.training.eval_iters == 0:
        yield Problem(
            ("--eval-iters", "--eval-interval"),
            f"an evaluation every {interval} steps is asked for, of no batch",
            "",
            "use --eval-iters 10, or leave out --eval-interval",
        )


@rule("training.eval_interval")
def without_training_there_is_evaluation(config: Config, world_size: int) -> Iterator[Problem]:
    """A run that does not train evaluates."""
    if config.training.skip_train and config.training.eval_interval is None:
        yield Problem(
            ("--skip-train", "--eval-interval"),
            "nothing is to be trained, and without --eval-interval nothing is evaluated either",
            "",
            "add --eval-interval 1, or leave out --skip-train",
        )


_SAVING = (
    "save_interval",
    "save_hf",
    "save_hf_interval",
    "non_persistent_save_interval",
    "save_retain_interval",
    "save_keep_last",
    "async_save",
    "no_save_optim",
)


@rule(*(f"checkpoint.{name}" for name in _SAVING))
def saving_has_a_folder(config: Config, world_size: int) -> Iterator[Problem]:
    """Checkpoints go somewhere."""
    given = [f"--{name.replace('_', '-')}" for name in _SAVING if getattr(config.checkpoint, name)]
    if given and not config.checkpoint.save:
        yield Problem(
            (*given, "--save"),
            f"{' and '.join(given)} speak{'s' if len(given) == 1 else ''} of checkpoints, but no folder is given",
            "",
            f"add --save FOLDER, or leave out {', '.join(given)}",
        )


@rule("checkpoint.save_hf", "checkpoint.save_hf_interval")
def exporting_has_a_folder(config: Config, world_size: int) -> Iterator[Problem]:
    """An interval alone says nothing of where to."""
    if config.checkpoint.save_hf_interval and not config.checkpoint.save_hf:
        yield Problem(
            ("--save-hf-interval", "--save-hf"),
            "Hugging Face folders are to be written, but nothing says where",
            "",
            "add --save-hf FOLDER, or leave out --save-hf-interval",
        )


@rule("checkpoint.load_hf", "checkpoint.pretrained_checkpoint", "checkpoint.finetune", "checkpoint.use_checkpoint_args")
def one_origin_of_weights(config: Config, world_size: int) -> Iterator[Problem]:
    """A new run begins with the weights of one model."""
    settings = config.checkpoint
    others = {
        "--pretrained-checkpoint": settings.pretrained_checkpoint,
        "--finetune": settings.finetune,
        "--use-checkpoint-args": settings.use_checkpoint_args,
    }
    flags = [flag for flag, given in others.items() if given]
    if settings.load_hf and flags:
        yield Problem(
            ("--load-hf", *flags),
            f"model and weights are to come from a Hugging Face folder, but {' and '.join(flags)} "
            f"take{'s' if len(flags) == 1 else ''} them from a checkpoint",
            "",
            f"{' and '.join(f'leave out {flag}' for flag in flags)}, or leave out --load-hf",
        )


_LOADING = (
    "ckpt_step",
    "allow_fallback",
    "finetune",
    "no_load_optim",
    "use_checkpoint_args",
    "exit_on_missing_checkpoint",
)


@rule(*(f"checkpoint.{name}" for name in _LOADING))
def loading_has_a_folder(config: Config, world_size: int) -> Iterator[Problem]:
    """A checkpoint that is spoken of is somewhere."""
    settings = config.checkpoint
    given = [name for name in _LOADING if getattr(settings, name) is not None and getattr(settings, name) is not False]
    if settings.pretrained_checkpoint and "use_checkpoint_args" in given:
        given.remove("use_checkpoint_args")
    flags = [f"--{name.replace('_', '-')}" for name in given]
    if flags and not settings.load:
        yield Problem(
            (*flags, "--load"),
            f"{' and '.join(flags)} speak{'s' if len(flags) == 1 else ''} of a checkpoint, but no folder is given",
            "",
            f"add --load FOLDER, or leave out {', '.join(flags)}",
        )


@rule("checkpoint.save_interval", "checkpoint.save_retain_interval")
def retained_checkpoints_are_saved(config: Config, world_size: int) -> Iterator[Problem]:
    """What is to be kept for good is saved."""
    interval, retained = config.checkpoint.save_interval, config.checkpoint.save_retain_interval
    if not retained or not config.checkpoint.save:
        return
    if not interval:
        yield Problem(
            ("--save-retain-interval",),
            f"every checkpoint that {retained} divides is to be kept, but no --save-interval says when to save",
            "",
            f"add --save-interval {retained}, or leave out --save-retain-interval",
        )
    elif retained % interval:
        near = max(interval, round(retained / interval) * interval)
        yield Problem(
            ("--save-retain-interval", "--save-interval"),
            f"a checkpoint is saved every {interval} steps, and those that {retained} divides are to be kept",
            f"{retained} % {interval} = {retained % interval}",
            f"use --save-retain-interval {near}",
        )


@rule("training.train_iters", "training.train_samples", "logging.timeline_step", *BATCH_SIZE_FIELDS)
def timeline_step_is_in_the_run(config: Config, world_size: int) -> Iterator[Problem]:
    """The step whose timeline is measured happens."""
    sizes = batch_sizes_or_none(config, world_size)
    if config.logging.timeline is None or sizes is None:
        return
    step, steps = config.logging.timeline_step, train_iters(config, sizes)
    if step > steps:
        yield Problem(
            ("--timeline-step", "--train-iters"),
            f"the timeline of step {step} is asked for, but the run ends after step {steps}",
            f"{step} > {steps}",
            f"use --timeline-step {steps} or less",
        )


@rule("data.dataloader_type")
def loader_is_our_own(config: Config, world_size: int) -> Iterator[Problem]:
    """There is no way to pass a loader in."""
    if config.data.dataloader_type == "external":
        yield Problem(
            ("--dataloader-type",),
            "an external loader would decide which samples a step reads, so that a run could not be resumed exactly",
            "",
            "use --dataloader-type single or cyclic",
        )


# Tokenizers that may be given as single files.
TOKENIZER_FILES = {
    "GPT2BPETokenizer": "--vocab-file vocab.json --merge-file merges.txt",
    "BertWordPieceLowerCase": "--vocab-file vocab.txt",
    "BertWordPieceCase": "--vocab-file vocab.txt",
}


@rule("data.tokenizer_type")
def tokenizer_has_a_model(config: Config, world_size: int) -> Iterator[Problem]:
    """A tokenizer is read from a file, except the one that does nothing."""
    kind, data = config.data.tokenizer_type, config.data
    if kind == "NullTokenizer" or data.tokenizer_model:
        return
    if kind in TOKENIZER_FILES:
        if not data.vocab_file or (kind == "GPT2BPETokenizer" and not data.merge_file):
            yield Problem(
                ("--vocab-file", "--merge-file", "--tokenizer-type"),
                f"{kind} is read from files, and not all of them are given",
                "",
                f"add {TOKENIZER_FILES[kind]}",
            )
    else:
        wanted = "tokenizer.json" if kind == "HuggingFaceTokenizer" else "tokenizer.model"
        yield Problem(
            ("--tokenizer-model", "--tokenizer-type"),
            f"{kind} is read from a file, and none is given",
            "",
            f"add --tokenizer-model {wanted}, or use --tokenizer-type NullTokenizer with --vocab-size",
        )


@rule("data.tokenizer_type", "model.vocab_size")
def null_tokenizer_has_a_vocabulary(config: Config, world_size: int) -> Iterator[Problem]:
    """A tokenizer that does nothing knows no vocabulary."""
    if config.data.tokenizer_type == "NullTokenizer" and config.model.vocab_size is None:
        yield Problem(
            ("--vocab-size", "--tokenizer-type"),
            "NullTokenizer does not tell the size of the vocabulary",
            "",
            "add --vocab-size 32000",
        )
