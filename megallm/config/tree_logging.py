"""The section `logging` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megallm.config.option import option


@dataclass(frozen=True)
class LoggingConfig:
    """What a run tells."""

    log_interval: int = option(100, "--log-interval", "steps between log lines")
    tensorboard_dir: str | None = option(None, "--tensorboard-dir", "folder for TensorBoard")
    metrics_jsonl: str | None = option(
        None, "--metrics-jsonl", "file that takes one JSON object per step with every scalar at full precision"
    )
    tensorboard_log_interval: int = option(1, "--tensorboard-log-interval", "steps between scalars in TensorBoard")
    tensorboard_queue_size: int = option(
        1000, "--tensorboard-queue-size", "scalars that TensorBoard's writer holds back before it writes"
    )
    wandb_project: str | None = option(
        None, "--wandb-project", "project of Weights & Biases that takes every scalar; needs the package wandb"
    )
    wandb_exp_name: str | None = option(None, "--wandb-exp-name", "with --wandb-project: name of the run")
    wandb_entity: str | None = option(None, "--wandb-entity", "with --wandb-project: user or team")
    wandb_save_dir: str | None = option(
        None, "--wandb-save-dir", "with --wandb-project: folder for its files; default: wandb in the --save folder"
    )
    log_params_norm: bool = option(False, "--log-params-norm", "the norm of all weights after each step")
    log_num_zeros_in_grad: bool = option(
        False, "--log-num-zeros-in-grad", "the number of elements of the gradient that are exactly zero"
    )
    log_memory_to_tensorboard: bool = option(
        False, "--log-memory-to-tensorboard", "memory of the first process, to TensorBoard and all others who write"
    )
    log_validation_ppl_to_tensorboard: bool = option(
        False,
        "--log-validation-ppl-to-tensorboard",
        "perplexity of each evaluation, to TensorBoard and all others who write; the log line always has it",
    )
    log_progress: bool = option(
        False, "--log-progress", "a line for each job and each checkpoint in progress.txt in the --save folder"
    )
    timing_log_level: int = option(
        0,
        "--timing-log-level",
        "1: with each log line, how long the parts of a step took; 2: forward and backward passes too",
    )
    timing_log_option: str = option(
        "minmax",
        "--timing-log-option",
        "with --timing-log-level: times of all ranks, the largest, or the smallest and the largest",
        choices=("max", "minmax", "all"),
    )
    log_timers_to_tensorboard: bool = option(
        False,
        "--log-timers-to-tensorboard",
        "with --timing-log-level: the largest times, to TensorBoard and all others",
    )
    profile: bool = option(
        False,
        "--profile",
        "profile some steps: for nsys with NVTX ranges, or with --use-pytorch-profiler and without a GPU into a trace",
    )
    profile_step_start: int = option(10, "--profile-step-start", "with --profile: the steps after this one")
    profile_step_end: int = option(12, "--profile-step-end", "with --profile: up to this one")
    profile_ranks: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        [], "--profile-ranks", "with --profile: ranks that are profiled; default: the first"
    )
    use_pytorch_profiler: bool = option(
        False,
        "--use-pytorch-profiler",
        "with --profile: a trace for Chrome or Perfetto in the folder of --tensorboard-dir, else of --save",
    )
    sample_interval: int | None = option(
        None, "--sample-interval", "steps between texts that the model writes, to TensorBoard and all others who write"
    )
    sample_prompt: str = option("The", "--sample-prompt", "with --sample-interval: what the model continues")
    sample_num_tokens: int = option(32, "--sample-num-tokens", "with --sample-interval: longest text, in tokens")
    timeline: str | None = option(
        None, "--timeline", "file prefix for the measured pipeline timeline of the step --timeline-step"
    )
    timeline_step: int = option(10, "--timeline-step", "step whose pipeline timeline is measured")
