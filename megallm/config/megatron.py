"""What a Megatron command line may hold beyond our own flags: aliases, flags without effect here, flags refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Alias:
    """A switch that sets a field of the tree to one value.

    A `yields` alias gives way where another flag or the file sets the field: it repeats what follows from that.
    """

    flag: str
    path: str
    value: Any
    yields: bool = False


ALIASES = (
    Alias("--swiglu", "model.activation", "swiglu"),
    Alias("--squared-relu", "model.activation", "squared_relu"),
    Alias("--openai-gelu", "model.activation", "gelu_tanh"),
    Alias("--use-rotary-position-embeddings", "model.position_embedding_type", "rope"),
    # Megatron's scripts write it beside a rotary flag, to say that there is no table of positions.
    Alias("--no-position-embedding", "model.position_embedding_type", "none", yields=True),
    Alias("--recompute-activations", "training.recompute_granularity", "selective"),
    Alias("--use-checkpoint-opt_param-scheduler", "optimizer.use_checkpoint_opt_param_scheduler", True),
    Alias("--override-opt_param-scheduler", "optimizer.use_checkpoint_opt_param_scheduler", False),
)

LAYERS_PER_VIRTUAL_STAGE = "--num-layers-per-virtual-pipeline-stage"


@dataclass(frozen=True)
class Ignored:
    """A flag (or a pattern of flags) without effect on what a run computes here, and why."""

    flag: str
    reason: str


@dataclass(frozen=True)
class Refused:
    """A flag (or a pattern of flags) that would change the run in a way we do not have, and what to do instead.

    With one of the values in `harmless` it asks for what happens here anyway, and is ignored.
    """

    flag: str
    reason: str
    harmless: tuple[str, ...] = ()


IGNORED = (
    Ignored(
        "--apply-query-key-layer-scaling", "scores are scaled before they are rounded, and their softmax is float32"
    ),
    Ignored("--attention-softmax-in-fp32", "the softmax is always taken in float32 at least"),
    Ignored("--transformer-impl", "there is one implementation"),
    Ignored("--attention-backend", "the fastest kernel that the mask allows is chosen"),
    Ignored("--use-flash-attn", "the fastest kernel that the mask allows is chosen"),
    Ignored("--empty-unused-memory-level", "it changes no result"),
    Ignored("--calculate-per-token-loss", "the loss is always averaged over the tokens of the whole batch"),
    Ignored("--cross-entropy-loss-fusion", "the fastest implementation is chosen"),
    Ignored("--cross-entropy-fusion-impl", "the fastest implementation is chosen; --loss-chunk-size saves memory"),
    Ignored("--no-check-for-nan-in-loss-and-grad", "a step with a non-finite gradient is always skipped"),
    Ignored("--accumulate-allreduce-grads-in-fp32", "gradients are always accumulated and reduced in float32 at least"),
    Ignored("--grad-reduce-in-bf16", "gradients are reduced in float32: more exact, twice the bytes"),
    Ignored("--no-overlap-p2p-communication", "it changes no result"),
    Ignored("--tp-comm-overlap*", "it changes no result"),
    Ignored("--overlap-param-gather-with-optimizer-step", "it changes no result"),
    Ignored("--ddp-num-buckets", "buckets are cut by --ddp-bucket-size"),
    Ignored("--ddp-average-in-collective", "it changes no result beyond rounding"),
    Ignored("--ddp-pad-buckets-for-high-nccl-busbw", "it changes no result"),
    Ignored("--cp-comm-type", "it only acts with --context-parallel-size"),
    Ignored("--use-cpu-initialization", "initial weights are the same on every device and layout"),
    Ignored("--local-rank", "ranks come from the launcher's environment"),
    Ignored("--use-mcore-models", "there is one implementation"),
    Ignored("--no-*-fusion", "the fastest implementation is chosen"),
    Ignored("--memory-efficient-layer-norm", "the fastest implementation is chosen"),
    Ignored("--init-model-with-meta-device", "initial weights are the same on every device and layout"),
    Ignored("--no-clone-scatter-output-in-embedding", "it changes no result"),
    Ignored("--te-rng-tracker", "randomness is a function of seed and step"),
    Ignored("--no-persist-layer-norm", "the fastest implementation is chosen"),
    Ignored("--no-async-tensor-model-parallel-allreduce", "it changes no result"),
    Ignored("--cuda-graph-*", "it changes no result"),
    Ignored("--nccl-communicator-config-path", "it changes no result"),
    Ignored("--no-create-attention-mask-in-dataloader", "masks are never made by the data loader"),
    Ignored("--create-attention-mask-in-dataloader", "masks are never made by the data loader"),
    Ignored("--dataloader-fast-cache-load", "a cache that is there is read without waiting for other processes"),
    Ignored("--dataloader-defer-npy-index-mmap", "it changes no result"),
    Ignored("--per-dataset-sequences-path", "each index says how many sequences it has"),
    Ignored("--mask-type", "it only acts with images"),
    Ignored("--legacy-tokenizer", "there is one implementation"),
    Ignored("--tokenizer-metadata", "a tokenizer is described by --tokenizer-type and its files"),
    Ignored("--tokenizer-hf-use-fast", "tokenizers are always the fast ones"),
    Ignored("--trust-remote-code", "no code of a tokenizer's folder is run"),
    Ignored("--no-save-rng", "randomness is a function of seed and step: there is no state to save"),
    Ignored("--no-load-rng", "randomness is a function of seed and step: there is no state to load"),
    Ignored("--ckpt-format", "there is one native format"),
    Ignored("--dist-ckpt-format", "there is one native format"),
    Ignored("--use-dist-ckpt", "there is one native format"),
    Ignored("--auto-detect-ckpt-format", "there is one native format"),
    Ignored("--exit-signal-handler", "SIGTERM always saves and leaves; SIGUSR1 saves and goes on"),
    Ignored("--ckpt-fully-parallel-save", "every rank always writes its own share"),
    Ignored("--ckpt-fully-parallel-load", "every rank always reads its own share"),
    Ignored("--dist-ckpt-optim-fully-reshardable", "optimizer state loads under any layout"),
    Ignored("--dist-ckpt-strictness", "a checkpoint that does not fit is always refused"),
    Ignored("--log-throughput", "the throughput is always in the log"),
    Ignored("--log-*", "it only adds to the log"),
    Ignored("--no-log-*", "it only takes from the log"),
    Ignored("--nvtx-ranges", "--profile always names its ranges"),
    Ignored("--record-memory-history", "it only records; --log-memory-to-tensorboard shows the peak"),
    Ignored("--no-one-logger", "there is no such logger"),
    Ignored("--enable-experimental", "there is nothing to enable"),
)

REFUSED = (
    Refused("--layernorm-epsilon", "this is its older name; use --norm-epsilon"),
    Refused("--checkpoint-activations", "this is its older name; use --recompute-granularity full"),
    Refused("--use-mup", "all widths learn at one rate; leave it out"),
    Refused("--mup-*", "all widths learn at one rate; leave it out"),
    Refused("--yarn-*", "rotary frequencies are scaled as in Llama 3; use --use-rope-scaling"),
    Refused("--rotary-scaling-factor", "this is YaRN's; use --use-rope-scaling with --rope-scaling-factor"),
    Refused(
        "--original-max-position-embeddings",
        "this is YaRN's; use --use-rope-scaling with --rope-scaling-original-length",
    ),
    Refused("--mrope-section", "a token has one position; leave it out"),
    Refused("--no-rope-freq", "all layers rotate or none does; leave it out"),
    Refused(
        "--relative-attention-*", "positions are learned, sinusoidal or rotary; use --position-embedding-type rope"
    ),
    Refused("--qk-l2-norm", "queries and keys are normalised with a weight; use --qk-layernorm"),
    Refused("--attention-output-gate", "the output of attention is not gated; leave it out"),
    Refused("--softmax-type", "attention weights sum to one; leave it out", ("vanilla",)),
    Refused("--quick-geglu", "its GELU is another; use --activation geglu"),
    Refused("--glu-linear-offset", "gates are taken as they are; leave it out", ("0", "0.0")),
    Refused("--activation-func-clamp-value", "activations are not clamped; leave it out"),
    Refused("--fp32-residual-connection", "the residual stream has the dtype of the weights; leave it out"),
    Refused("--heterogeneous-layers-config-*", "all layers are alike; leave it out"),
    Refused("--hybrid-*", "all layers are attention and MLP; leave it out"),
    Refused("--is-hybrid-model", "all layers are attention and MLP; leave it out"),
    Refused("--mamba-*", "all layers are attention and MLP; leave it out"),
    Refused("--spec", "layers are described by flags; leave it out"),
    Refused("--cpu-offloading*", "activations stay on the device; use --recompute-granularity full"),
    Refused("--fine-grained-activation-offloading", "activations stay on the device; use --recompute-granularity full"),
    Refused("--window-attn-skip-freq", "all layers see the same window; leave it out"),
    Refused("--softmax-scale", "scores are divided by the root of a head's width; leave it out"),
    Refused("--qk-clip*", "queries and keys are not clipped; use --qk-layernorm"),
    Refused("--multi-latent-attention", "attention is multi-head or grouped; use --num-query-groups"),
    Refused("--mtp-num-layers", "one token is predicted at a time; leave it out", ("0",)),
    Refused("--num-experts", "layers are dense; leave it out"),
    Refused("--moe-*", "layers are dense; leave it out"),
    Refused(
        "--decrease-batch-size-if-needed",
        "the batch size does not depend on the number of processes; leave it out and give sizes that divide",
    ),
    Refused("--data-parallel-random-init", "initial weights are a function of the seed alone; use --seed"),
    Refused("--fp16-lm-cross-entropy", "the loss is computed in float32; leave it out"),
    Refused("--fp8-*", "there is no float8; use --bf16"),
    Refused(
        "--context-parallel-size", "sequences are not cut over processes; use --tensor-model-parallel-size", ("1",)
    ),
    Refused("--expert-model-parallel-size", "layers are dense; use --tensor-model-parallel-size", ("1",)),
    Refused("--use-tp-pp-dp-mapping", "ranks are ordered tensor, data, pipeline; leave it out"),
    Refused("--num-distributed-optimizer-instances", "there is one; leave it out", ("1",)),
    Refused("--use-torch-fsdp2", "weights are not sharded over data ranks; use --use-distributed-optimizer"),
    Refused("--use-megatron-fsdp", "weights are not sharded over data ranks; use --use-distributed-optimizer"),
    Refused("--data-parallel-sharding-strategy", "use --use-distributed-optimizer", ("no_shard",)),
    Refused("--distribute-saved-activations", "leave it out; sequence parallelism splits what is saved already"),
    Refused("--yaml-cfg", "use --config FILE.yaml"),
    Refused("--object-storage-cache-path", "files are read from folders; mount the store and use --no-mmap-bin-files"),
    Refused("--s3-cache-path", "files are read from folders; mount the store and use --no-mmap-bin-files"),
    Refused(
        "--allow-ambiguous-pad-tokens",
        "a padding token that is a special token too is learned; leave it out, or give padding a token of its own",
    ),
    Refused("--phase-transition-iterations", "a run has one list of data; leave it out"),
    Refused("--fim-*", "documents are read in their order; leave it out"),
    Refused("--sft*", "this program trains on documents, not on conversations; leave it out"),
    Refused("--bert-load", "no retriever is trained; use --pretrained-checkpoint to begin with a BERT"),
    Refused("--bert-embedder-type", "no texts are looked up; leave it out"),
    Refused("--ict-*", "no retriever is trained; leave it out"),
    Refused("--biencoder-*", "no retriever is trained; leave it out"),
    Refused("--retriever-*", "no retriever is trained; leave it out"),
    Refused("--titles-data-path", "no retriever is trained; leave it out"),
    Refused("--encoder-num-layers", "a model has one stack of layers; use --num-layers"),
    Refused("--decoder-num-layers", "a model has one stack of layers; use --num-layers"),
    Refused("--encoder-seq-length", "a model has one stack of layers; use --seq-length"),
    Refused("--decoder-seq-length", "a model has one stack of layers; use --seq-length"),
)


def answer(flag: str, values: Sequence[str]) -> Ignored | Refused | None:
    """What to say to a flag of Megatron's that is none of ours; None where it is unknown there too.

    The result's `flag` is the flag as it was written. An exact entry goes before a pattern.
    """
    refused = _find(REFUSED, flag)
    if refused is not None:
        if values and all(value in refused.harmless for value in values):
            return Ignored(flag, f"{' '.join(values)} is what happens here anyway")
        return Refused(flag, refused.reason)
    ignored = _find(IGNORED, flag)
    return None if ignored is None else Ignored(flag, ignored.reason)


def _find(table: Sequence[Any], flag: str) -> Any:
    exact = [entry for entry in table if entry.flag == flag]
    pattern = [entry for entry in table if "*" in entry.flag and fnmatchcase(flag, entry.flag)]
    return (exact + pattern + [None])[0]


@dataclass(frozen=True)
class Difference:
    """A point in which we differ from Megatron on purpose."""

    subject: str
    megatron: str
    here: str
    reason: str


DIFFERENCES = (
    Difference(
        "Sequence parallelism",
        "off, `--sequence-parallel` turns it on",
        "on with tensor parallelism, `--no-sequence-parallel` turns it off",
        "it saves memory; two more gathers per layer in the backward pass run beside its matrix products",
    ),
    Difference(
        "Dropout",
        "`--attention-dropout 0.1 --hidden-dropout 0.1`",
        "both 0",
        "large models see their data about once and are trained without",
    ),
    Difference(
        "Average of the loss",
        "mean over micro-batches of their means, unless `--calculate-per-token-loss`",
        "always over the tokens of the whole batch",
        "with masked tokens a mean of means depends on how the batch is cut",
    ),
    Difference(
        "Initial weights and dropout masks",
        "depend on tensor and pipeline sizes",
        "functions of `--seed`, step, name and position in the whole tensor",
        "a layout must not change the result",
    ),
    Difference(
        "Vocabulary padding",
        "`--make-vocab-size-divisible-by 128`; the padded size is in the checkpoint",
        "1; padding exists at run time only",
        "checkpoints must load under any layout",
    ),
    Difference(
        "Key/value heads",
        "`--num-query-groups` is 1 by default and ignored without `--group-query-attention`",
        "as many as query heads; fewer need both flags",
        "neither flag may change the model in silence",
    ),
    Difference(
        "`--activation gelu`",
        "the fused kernel computes the tanh approximation",
        "exact; `--openai-gelu` or `--activation gelu_tanh` gives the approximation",
        "a fusion must not change the function",
    ),
    Difference(
        "`--max-position-embeddings`",
        "required",
        "the sequence length by default",
        "most runs want that",
    ),
    Difference(
        "`--num-layers` over stages",
        "must divide, or is cut by hand",
        "any number; split by cost, output layer included, or by hand with the same flags",
        "balanced stages waste less time",
    ),
    Difference(
        "`--num-workers`",
        "2",
        "2 with a GPU; without one 0: samples are read in the training process",
        "reading costs less time than a process takes from a training that runs on the same cores",
    ),
    Difference(
        "Batches that grow",
        "`--rampup-batch-size` needs `--train-samples`, and `--lr-warmup-iters` counts steps of the final size",
        "with `--train-iters` too; a length in steps stands for the samples of those very steps",
        "a step is a step, whatever its size",
    ),
    Difference(
        "Another schedule of the learning rate on resuming",
        "refused without `--override-opt_param-scheduler`",
        "the command line's holds, and what has changed is told; `--use-checkpoint-opt_param-scheduler` keeps the "
        "checkpoint's",
        "who gives another flag means it",
    ),
    Difference(
        "`--lr-wsd-decay-iters` with batches that grow",
        "steps of the final size",
        "the very last steps before the decay ends",
        "a step is a step, whatever its size",
    ),
    Difference(
        "`--profile` without `--use-pytorch-profiler`",
        "for nsys, which sees GPUs only",
        "the same; without a GPU a trace of torch's profiler. `--profile-ranks` is the first rank by default",
        "the same command runs on a CPU",
    ),
    Difference(
        "`--distributed-timeout-minutes`",
        "torch ends the process that waited",
        "every process tells what it waits for and where it stands, then ends with exit code 69",
        "the one that waits is seldom the cause",
    ),
    Difference(
        "`--deterministic-mode`",
        "asks for `NCCL_ALGO` in the environment",
        "sets it to `Ring` where it is not set; not tried on a GPU yet",
        "a flag should suffice",
    ),
    Difference(
        "Length in samples",
        "turned to steps at the start of each job: a batch size changed on resume ends the run elsewhere",
        "counted from the consumed samples",
        "the run reads what it was given",
    ),
    Difference(
        "Resuming with other data flags or another length",
        "indices are dealt anew in silence, so that samples are seen again or never",
        "refused with what has changed; `--allow-data-change` confirms",
        "a run must not lose its place unnoticed",
    ),
    Difference(
        "`--split-sentences` with a tokenizer that surrounds texts",
        "each sentence is surrounded, with [CLS] and [SEP] for example",
        "sentences are not",
        "a sample puts sentences together, and surrounds them itself",
    ),
    Difference(
        "Resuming with flags of another model",
        "some are compared, others change the model in silence",
        "all are compared; `--allow-model-change` confirms",
        "weights must not come to mean something else unnoticed",
    ),
    Difference(
        "`--use-checkpoint-args`",
        "some flags win over the checkpoint, others lose",
        "the model is the checkpoint's, and each flag that says otherwise is told; sequence length and tokenizer are "
        "where no flag names them",
        "one rule can be remembered; files of tokenizers move",
    ),
    Difference(
        "`--finetune` with no checkpoint in `--load`",
        "trains from random weights",
        "is refused",
        "nobody fine-tunes random weights on purpose",
    ),
    Difference(
        "`--dataloader-type cyclic --no-data-sharding`",
        "ranks drift into different epochs where the samples make no whole batches",
        "the rest of each epoch is left out on all ranks",
        "no sample may be read twice in an epoch",
    ),
    Difference(
        "`--distributed-backend`",
        "`nccl`",
        "`nccl` with one GPU a process, `gloo` otherwise",
        "the same command runs on a CPU",
    ),
    Difference(
        "Evaluation",
        "`--eval-interval` must be given",
        "none without `--eval-interval`",
        "a run without evaluation is a sound run",
    ),
)
