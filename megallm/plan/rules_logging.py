"""Rules about what a run tells and measures."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.config.resolve import train_iters
from megallm.config.tree import Config
from megallm.plan.problem import Problem, rule
from megallm.plan.rules_batches import BATCH_SIZE_FIELDS, batch_sizes_or_none


@rule()
def weights_and_biases_is_named(config: Config, world_size: int) -> Iterator[Problem]:
    """A run of Weights & Biases has a project and a name."""
    logging = config.logging
    if logging.wandb_project and not logging.wandb_exp_name:
        yield Problem(
            ("--wandb-exp-name", "--wandb-project"),
            f"the project {logging.wandb_project} is given, but no name for this run",
            "",
            "add --wandb-exp-name NAME, or leave out --wandb-project",
        )
    others = {
        "--wandb-exp-name": logging.wandb_exp_name,
        "--wandb-entity": logging.wandb_entity,
        "--wandb-save-dir": logging.wandb_save_dir,
    }
    given = [flag for flag, value in others.items() if value]
    if given and not logging.wandb_project:
        yield Problem(
            (*given, "--wandb-project"),
            f"{' and '.join(given)} speak{'s' if len(given) == 1 else ''} of Weights & Biases, but no project is given",
            "",
            f"add --wandb-project NAME, or leave out {', '.join(given)}",
        )


@rule("logging.sample_interval", "data.tokenizer_type")
def samples_are_texts(config: Config, world_size: int) -> Iterator[Problem]:
    """A model that writes has a tokenizer, and something to continue."""
    if config.logging.sample_interval is None:
        return
    if config.data.tokenizer_type == "NullTokenizer":
        yield Problem(
            ("--sample-interval", "--tokenizer-type"),
            "the model is to write texts, but NullTokenizer knows numbers only",
            "",
            "leave out --sample-interval, or give a tokenizer of text with --tokenizer-type and --tokenizer-model",
        )
    if not config.logging.sample_prompt:
        yield Problem(
            ("--sample-prompt",),
            "the model continues a text, and this one is empty",
            "",
            "use --sample-prompt The",
        )


@rule()
def progress_file_has_a_folder(config: Config, world_size: int) -> Iterator[Problem]:
    """The file of progress lies beside the checkpoints."""
    if config.logging.log_progress and not config.checkpoint.save:
        yield Problem(
            ("--log-progress", "--save"),
            "the file progress.txt lies beside the checkpoints, but no folder is given",
            "",
            "add --save FOLDER, or leave out --log-progress",
        )


@rule("logging.timing_log_level")
def timers_have_a_level(config: Config, world_size: int) -> Iterator[Problem]:
    """Times that are to be written are measured."""
    if config.logging.log_timers_to_tensorboard and config.logging.timing_log_level == 0:
        yield Problem(
            ("--log-timers-to-tensorboard", "--timing-log-level"),
            "times are to be written, but at level 0 none is measured",
            "",
            "add --timing-log-level 1, or leave out --log-timers-to-tensorboard",
        )


@rule(
    "training.train_iters",
    "training.train_samples",
    "logging.profile_step_start",
    "logging.profile_step_end",
    *BATCH_SIZE_FIELDS,
)
def profiled_steps_are_in_the_run(config: Config, world_size: int) -> Iterator[Problem]:
    """There is a step to be profiled."""
    logging, sizes = config.logging, batch_sizes_or_none(config, world_size)
    if not logging.profile or sizes is None:
        return
    start, end, steps = logging.profile_step_start, logging.profile_step_end, train_iters(config, sizes)
    if start >= end:
        yield Problem(
            ("--profile-step-start", "--profile-step-end"),
            f"the steps after step {start} up to step {end} are to be profiled, and there are none",
            f"{start} >= {end}",
            f"use --profile-step-end {start + 2}",
        )
    elif start >= steps:
        yield Problem(
            ("--profile-step-start", "--profile-step-end"),
            f"the steps after step {start} are to be profiled, but the run ends after step {steps}",
            f"{start} >= {steps}",
            f"use --profile-step-start {steps - 1} --profile-step-end {steps}, or more steps",
        )


@rule()
def profiled_ranks_exist(config: Config, world_size: int) -> Iterator[Problem]:
    """Ranks to be profiled are ranks of this job."""
    strange = [rank for rank in config.logging.profile_ranks if not rank.isdecimal() or int(rank) >= world_size]
    if strange:
        yield Problem(
            ("--profile-ranks",),
            f"{', '.join(strange)} {'is no rank' if len(strange) == 1 else 'are no ranks'} of {world_size} processes",
            "",
            f"use ranks from 0 to {world_size - 1}, as in --profile-ranks 0",
        )
