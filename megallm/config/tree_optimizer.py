"""The section `optimizer` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megallm.config.option import option


@dataclass(frozen=True)
class OptimizerConfig:
    """The kind of update, clipping, learning rate and weight decay."""

    optimizer: str = option(
        "adam",
        "--optimizer",
        "adam: AdamW, with decoupled weight decay; sgd: gradient descent with momentum",
        choices=("adam", "sgd"),
    )
    lr: float = option(0.0, "--lr", "peak learning rate")
    min_lr: float = option(0.0, "--min-lr", "learning rate after the decay")
    decoupled_lr: float | None = option(
        None,
        "--decoupled-lr",
        "peak learning rate of the word embedding and the output layer; default: that of all others",
    )
    decoupled_min_lr: float | None = option(
        None, "--decoupled-min-lr", "with --decoupled-lr: their learning rate after the decay; default: --min-lr"
    )
    lr_decay_style: str = option(
        "linear",
        "--lr-decay-style",
        "shape of the decay; WSD stays at the peak until --lr-wsd-decay-iters before the end",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = option(
        None, "--lr-decay-iters", "steps until the learning rate is at its minimum; default: the length of the run"
    )
    lr_decay_samples: int | None = option(None, "--lr-decay-samples", "the same, in sequences")
    lr_wsd_decay_style: str = option(
        "exponential",
        "--lr-wsd-decay-style",
        "with WSD: shape of the decay at the end",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = option(
        None, "--lr-wsd-decay-iters", "with WSD: steps of the decay at the end; or give --lr-wsd-decay-samples"
    )
    lr_wsd_decay_samples: int | None = option(None, "--lr-wsd-decay-samples", "the same, in sequences")
    lr_warmup_iters: int = option(0, "--lr-warmup-iters", "steps of linear warm-up")
    lr_warmup_samples: int = option(0, "--lr-warmup-samples", "the same, in sequences")
    lr_warmup_fraction: float | None = option(
        None, "--lr-warmup-fraction", "the same, as a part of the way to the end of the decay"
    )
    lr_warmup_init: float = option(0.0, "--lr-warmup-init", "learning rate at the start of the warm-up")
    use_checkpoint_opt_param_scheduler: bool = option(
        False,
        "--use-checkpoint-opt-param-scheduler",
        "on resuming, learning rate and weight decay go on as the run that saved the checkpoint had them, whatever "
        "the flags say",
        off_flag="--override-opt-param-scheduler",
    )
    weight_decay: float = option(0.01, "--weight-decay", "weight decay; norms and biases do not decay")
    start_weight_decay: float | None = option(
        None, "--start-weight-decay", "weight decay at the start, where it changes over the run"
    )
    end_weight_decay: float | None = option(
        None, "--end-weight-decay", "weight decay at the end, where it changes over the run"
    )
    weight_decay_incr_style: str = option(
        "constant",
        "--weight-decay-incr-style",
        "how weight decay goes from its start to its end over the run; constant: it is --weight-decay",
        choices=("constant", "linear", "cosine"),
    )
    adam_beta1: float = option(0.9, "--adam-beta1", "decay of the first moment")
    adam_beta2: float = option(0.999, "--adam-beta2", "decay of the second moment")
    adam_eps: float = option(1e-8, "--adam-eps", "added to the root of the second moment")
    sgd_momentum: float = option(0.9, "--sgd-momentum", "with --optimizer sgd: decay of the momentum")
    clip_grad: float = option(1.0, "--clip-grad", "largest global norm of the gradient; 0 switches clipping off")
