"""The configuration: one tree of frozen dataclasses, the only truth about a run.

Every field carries its command-line flag and its help text in its metadata, so that the parser, the YAML file, the
saved configuration and the documentation all come from here; the sections `optimizer` and `logging` stand in files of
their own. Flags have Megatron's names and meaning where the
thing is the same. A number of 0 as default of a required field means "not given".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megallm.config.option import option
from megallm.config.tree_logging import LoggingConfig
from megallm.config.tree_optimizer import OptimizerConfig


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the transformer."""

    architecture: str = option(
        "gpt",
        "--architecture",
        "gpt: a decoder that predicts the next token; bert: an encoder that finds masked ones; default: what the "
        "program trains",
        choices=("gpt", "bert"),
    )
    num_layers: int = option(0, "--num-layers", "number of transformer layers")
    hidden_size: int = option(0, "--hidden-size", "width of the residual stream")
    ffn_hidden_size: int | None = option(
        None,
        "--ffn-hidden-size",
        "width inside the MLP; default 4 x hidden, with a gated activation 8/3 x hidden rounded down to a "
        "multiple of 64",
    )
    num_attention_heads: int = option(0, "--num-attention-heads", "number of query heads")
    group_query_attention: bool = option(
        False,
        "--group-query-attention",
        "share each key and value head among several query heads; needs --num-query-groups",
    )
    num_query_groups: int | None = option(
        None,
        "--num-query-groups",
        "number of key/value heads; 1 is multi-query attention; default: as many as query heads",
    )
    kv_channels: int | None = option(None, "--kv-channels", "width of one attention head; default hidden / heads")
    max_position_embeddings: int | None = option(
        None,
        "--max-position-embeddings",
        "length of the learned or sinusoidal position table; default: the sequence length",
    )
    position_embedding_type: str = option(
        "learned_absolute",
        "--position-embedding-type",
        "how positions enter the model",
        choices=("learned_absolute", "sinusoidal", "rope", "none"),
    )
    rotary_base: float = option(10000.0, "--rotary-base", "base of the rotary frequencies")
    rotary_percent: float = option(
        1.0, "--rotary-percent", "share of each head's channels that rotary positions turn, the first ones"
    )
    rotary_interleaved: bool = option(
        False,
        "--rotary-interleaved",
        "rotary positions turn channels 2i and 2i+1 as a pair (GPT-J), not i and i + half (GPT-NeoX, Llama)",
    )
    rotary_seq_len_interpolation_factor: float | None = option(
        None, "--rotary-seq-len-interpolation-factor", "rotary positions are divided by this; default: they are not"
    )
    use_rope_scaling: bool = option(
        False,
        "--use-rope-scaling",
        "slow down the low rotary frequencies as Llama 3.1 and later do, for texts longer than they were trained on",
    )
    rope_scaling_factor: float = option(
        8.0, "--rope-scaling-factor", "with --use-rope-scaling: the lowest frequencies are divided by this"
    )
    rope_scaling_low_freq_factor: float = option(
        1.0,
        "--rope-scaling-low-freq-factor",
        "with --use-rope-scaling: frequencies that turn fewer times within the original length are fully divided",
    )
    rope_scaling_high_freq_factor: float = option(
        4.0,
        "--rope-scaling-high-freq-factor",
        "with --use-rope-scaling: frequencies that turn more times within the original length stay as they are",
    )
    rope_scaling_original_length: int = option(
        8192, "--rope-scaling-original-length", "with --use-rope-scaling: tokens in a sequence before the scaling"
    )
    normalization: str = option("LayerNorm", "--normalization", "kind of norm", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "--norm-epsilon", "added to the variance inside the norm")
    apply_layernorm_1p: bool = option(
        False, "--apply-layernorm-1p", "keep the weights of norms, of either kind, as what is added to 1"
    )
    qk_layernorm: bool = option(
        False, "--qk-layernorm", "normalise queries and keys over the channels of each head, before rotary positions"
    )
    apply_residual_connection_post_layernorm: bool = option(
        False,
        "--apply-residual-connection-post-layernorm",
        "add attention and MLP to their normalised inputs, as the original BERT does, not to the inputs before the "
        "norm",
    )
    parallel_residual: bool = option(
        False,
        "--parallel-residual",
        "attention and MLP of a layer both read its input (GPT-NeoX), instead of one after the other",
    )
    scale_embeddings: bool = option(
        False, "--scale-embeddings", "multiply word embeddings by the root of the hidden size (Gemma)"
    )
    window_size: str | None = option(
        None,
        "--window-size",
        "LEFT,RIGHT: positions before and after its own that a token may look at, -1 for all; RIGHT is 0 in a decoder",
    )
    activation: str = option(
        "gelu",
        "--activation",
        "activation of the MLP; the switches --swiglu, --squared-relu and --openai-gelu set it too",
        choices=("gelu", "gelu_tanh", "relu", "squared_relu", "swiglu", "geglu"),
    )
    add_bias_linear: bool = option(
        True, "--add-bias-linear", "biases on every linear layer", off_flag="--disable-bias-linear"
    )
    add_qkv_bias: bool = option(False, "--add-qkv-bias", "biases on the query, key and value projection only")
    tie_embeddings: bool = option(
        True,
        "--tie-embeddings-and-output-weights",
        "one matrix serves as input embedding and output layer",
        off_flag="--untie-embeddings-and-output-weights",
    )
    bert_binary_head: bool = option(
        True,
        "--bert-binary-head",
        "BERT also learns whether two texts are in their order: samples are pairs, and the first token has a head of "
        "its own",
        off_flag="--bert-no-binary-head",
    )
    num_token_types: int | None = option(
        None,
        "--num-token-types",
        "rows of BERT's table of token types, one for each text of a sample; default: 2 with the binary head, else 0",
    )
    attention_dropout: float = option(0.0, "--attention-dropout", "dropout probability of attention weights")
    hidden_dropout: float = option(
        0.0, "--hidden-dropout", "dropout probability of embeddings and of each block's output before the residual sum"
    )
    init_method_std: float = option(
        0.02,
        "--init-method-std",
        "standard deviation of the initial weights; output projections of each block use it divided by sqrt(2 x "
        "layers)",
    )
    init_method_xavier_uniform: bool = option(
        False,
        "--init-method-xavier-uniform",
        "initial weights of all matrices are uniform within sqrt(6 / (rows + columns)), query, key and value as one "
        "matrix, and gate and up",
    )
    embedding_init_method_std: float | None = option(
        None,
        "--embedding-init-method-std",
        "standard deviation of the initial embeddings of words and positions; default: as other matrices",
    )
    vocab_size: int | None = option(None, "--vocab-size", "true size of the vocabulary; default: the tokenizer's")
    make_vocab_size_divisible_by: int = option(
        1,
        "--make-vocab-size-divisible-by",
        "the vocabulary is padded at run time to a multiple of this times the tensor parallel size; the "
        "description, norms and checkpoints keep the true size",
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are laid out over processes."""

    tensor_model_parallel_size: int = option(
        1, "--tensor-model-parallel-size", "processes that share each layer's matrices"
    )
    pipeline_model_parallel_size: int = option(
        1, "--pipeline-model-parallel-size", "processes that share the stack of layers"
    )
    num_virtual_stages_per_pipeline_rank: int = option(
        1,
        "--num-virtual-stages-per-pipeline-rank",
        "model chunks on each pipeline rank; above 1 the schedule is interleaved 1F1B",
    )
    microbatch_group_size_per_virtual_pipeline_stage: int | None = option(
        None,
        "--microbatch-group-size-per-virtual-pipeline-stage",
        "interleaved: micro-batches that go through one virtual stage before the rank turns to its next; default: the "
        "pipeline size",
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "--pipeline-model-parallel-layout",
        'what each stage holds, such as "Et*3|(tt|)*2tL": E the embedding, t a layer, L the output layer, bars between '
        "stages, * repeats; default: layers are split by cost, output layer included",
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None,
        "--decoder-first-pipeline-num-layers",
        "layers of the first pipeline rank; the ranks whose number is not given share the rest evenly",
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "--decoder-last-pipeline-num-layers", "layers of the last pipeline rank"
    )
    account_for_embedding_in_pipeline_split: bool = option(
        False, "--account-for-embedding-in-pipeline-split", "the embedding counts as one layer in the split over stages"
    )
    account_for_loss_in_pipeline_split: bool = option(
        False,
        "--account-for-loss-in-pipeline-split",
        "the output layer counts as one layer in the split over stages, not as its cost",
    )
    sequence_parallel: bool = option(
        True,
        "--sequence-parallel",
        "split norms, dropouts and residuals along the sequence over the tensor ranks; has no effect at tensor size 1",
        off_flag="--no-sequence-parallel",
    )
    pipeline_schedule: str = option(
        "auto",
        "--pipeline-schedule",
        "order of forwards and backwards; auto is 1f1b, or interleaved with virtual stages",
        choices=("auto", "gpipe", "1f1b", "interleaved"),
    )
    use_distributed_optimizer: bool = option(
        False,
        "--use-distributed-optimizer",
        "each data parallel rank keeps and updates its share of the optimizer state (ZeRO-1)",
    )
    overlap_grad_reduce: bool = option(
        False, "--overlap-grad-reduce", "reduce gradients while the backward pass still runs"
    )
    overlap_param_gather: bool = option(
        False,
        "--overlap-param-gather",
        "gather updated parameters while the next forward pass already runs; needs the distributed optimizer",
    )
    ddp_bucket_size: int | None = option(
        None,
        "--ddp-bucket-size",
        "elements in a gradient bucket; default max(40,000,000, 1,000,000 x data parallel size)",
    )
    distributed_backend: str | None = option(
        None, "--distributed-backend", "default: nccl with one GPU a process, gloo otherwise", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: float = option(
        10.0, "--distributed-timeout-minutes", "a collective that takes longer ends the job"
    )


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, precision, recomputation, evaluation and length of the run."""

    micro_batch_size: int = option(
        0, "--micro-batch-size", "sequences that one data parallel rank takes through the model at once"
    )
    global_batch_size: int | None = option(
        None,
        "--global-batch-size",
        "sequences of one optimizer step over all ranks; default micro-batch x data parallel size",
    )
    rampup_batch_size: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        [],
        "--rampup-batch-size",
        "START INCREMENT SAMPLES: the batch grows from START by INCREMENT up to the global batch size, in equal shares "
        "of the first SAMPLES",
    )
    step_batch_size_schedule: str | None = option(
        None,
        "--step-batch-size-schedule",
        'batch sizes from so many tokens on, such as "0:768 250B:1536"; the global batch size is then the largest',
    )
    train_iters: int = option(0, "--train-iters", "number of optimizer steps; or give --train-samples")
    train_samples: int | None = option(
        None, "--train-samples", "length of the run in sequences, instead of --train-iters; an incomplete batch is left"
    )
    eval_interval: int | None = option(None, "--eval-interval", "steps between evaluations; default: none")
    eval_iters: int = option(100, "--eval-iters", "global batches in one evaluation")
    skip_train: bool = option(
        False, "--skip-train", "train nothing: evaluate once on the validation data, and on the test data"
    )
    manual_gc: bool = option(
        False, "--manual-gc", "no garbage collection by itself within the training, alike on all ranks"
    )
    manual_gc_interval: int = option(
        0, "--manual-gc-interval", "steps between garbage collections with --manual-gc; 0: none between steps"
    )
    no_manual_gc_eval: bool = option(
        False, "--no-manual-gc-eval", "with --manual-gc, no garbage collection before and after an evaluation either"
    )
    exit_interval: int | None = option(
        None,
        "--exit-interval",
        "save and leave after the first step that this divides; the run's length and schedules stay as given",
    )
    exit_duration_in_mins: float | None = option(
        None,
        "--exit-duration-in-mins",
        "save and leave so that the run has ended, its checkpoint on the disk, after this many minutes",
    )
    seed: int = option(1234, "--seed", "seeds initial weights, dropout and the order of the data")
    deterministic_mode: bool = option(
        False,
        "--deterministic-mode",
        "two runs on the same GPUs give the same bits: torch and NCCL are held to algorithms that do, slower ones of "
        "attention among them, and an operator that has none ends the run (on a CPU it is always so)",
    )
    bf16: bool = option(False, "--bf16", "bfloat16 weights and activations, float32 master weights and gradients")
    fp16: bool = option(
        False,
        "--fp16",
        "float16 weights and activations, float32 master weights and gradients, the loss scaled before its backward "
        "pass",
    )
    loss_scale: float | None = option(
        None, "--loss-scale", "with --fp16: a scale that stays as it is; default: one that moves, as follows"
    )
    initial_loss_scale: float = option(2.0**32, "--initial-loss-scale", "with --fp16: scale of the first step")
    min_loss_scale: float = option(1.0, "--min-loss-scale", "with --fp16: the scale never goes below")
    loss_scale_window: int = option(
        1000, "--loss-scale-window", "with --fp16: steps in a row with finite gradients after which the scale doubles"
    )
    hysteresis: int = option(
        2,
        "--hysteresis",
        "with --fp16: the scale halves at this skipped step since it last doubled, and at each one after it",
    )
    fp64: bool = option(
        False, "--fp64", "everything in float64: the oracle against which other precisions and layouts are checked"
    )
    recompute_granularity: str | None = option(
        None,
        "--recompute-granularity",
        "full: keep only the inputs of layers and compute the layers again in the backward pass; selective: some "
        "modules of each layer only",
        choices=("full", "selective"),
    )
    recompute_method: str = option(
        "uniform",
        "--recompute-method",
        "with full granularity: uniform cuts the layers of a stage into runs of --recompute-num-layers and keeps the "
        "input of each run; block computes so many layers of each stage again, each by itself, and keeps all of the "
        "others",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = option(1, "--recompute-num-layers", "number of layers for --recompute-method")
    recompute_modules: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        ["core_attn"],
        "--recompute-modules",
        "with selective granularity: core_attn (scores, softmax and their product with the values), mlp, or both",
    )
    loss_chunk_size: int = option(
        0,
        "--loss-chunk-size",
        "tokens for which output layer and loss are computed at once, such as 1024, so that a micro-batch's logits "
        "never exist whole, for a third more of the output layer's time; 0 is all of a micro-batch",
    )
    label_smoothing: float = option(
        0.0,
        "--label-smoothing",
        "share of each target's probability that training spreads over all words, as in torch; the log's lm loss, in "
        "training and evaluation, is without it",
    )
    z_loss_coeff: float = option(
        0.0,
        "--z-loss-coeff",
        "training also lowers this, such as 1e-4, times the mean square of the logarithm of the softmax's denominator, "
        "which keeps logits from drifting (PaLM); the log has that mean square as z loss, and lm loss is without it",
    )
    device: str = option("auto", "--device", "where to run", choices=("auto", "cpu", "cuda"))
    ops: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        [],
        "--ops",
        "which operators compute: auto (the native ones where they are built, plain torch elsewhere), native, "
        "reference (plain torch), or torch and apex, whose fused operators are used where they have one; or for single "
        "operators, as in: native rms_norm=reference",
    )


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    data_path: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        [], "--data-path", "prefix of a .bin/.idx dataset, or several, each optionally preceded by its weight"
    )
    data_args_path: str | None = option(None, "--data-args-path", "file that holds what --data-path would")
    split: str = option("969, 30, 1", "--split", "shares of training, validation and test data")
    train_data_path: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        [], "--train-data-path", "as --data-path, for training alone; then --split is not used"
    )
    valid_data_path: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        [], "--valid-data-path", "as --data-path, for validation alone"
    )
    test_data_path: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        [], "--test-data-path", "as --data-path, for the evaluation at the end alone"
    )
    per_split_data_args_path: str | None = option(
        None, "--per-split-data-args-path", 'JSON file that holds these three lists as "train", "valid" and "test"'
    )
    multiple_validation_sets: bool = option(
        False, "--multiple-validation-sets", "evaluate on each dataset of the validation data by itself, not on a blend"
    )
    full_validation: bool = option(
        False,
        "--full-validation",
        "each evaluation reads all whole batches of the validation data once, instead of --eval-iters of them",
    )
    drop_last_partial_validation_sequence: bool = option(
        True,
        "--drop-last-partial-validation-sequence",
        "leave out the tokens at the end of the validation data that do not fill a sequence, instead of padding them",
        off_flag="--no-drop-last-partial-validation-sequence",
    )
    mmap_bin_files: bool = option(
        True,
        "--mmap-bin-files",
        "map data files into memory; plain reads suit mounts of object stores",
        off_flag="--no-mmap-bin-files",
    )
    num_dataset_builder_threads: int = option(
        1, "--num-dataset-builder-threads", "datasets of a blend that are opened and indexed at once"
    )
    mid_level_dataset_surplus: float = option(
        0.005,
        "--mid-level-dataset-surplus",
        "each dataset of a weighted blend is built this share larger than its part, which is rounded up",
    )
    data_cache_path: str | None = option(
        None, "--data-cache-path", "folder for the sample indices; default: beside the dataset"
    )
    mock_data: bool = option(False, "--mock-data", "synthetic data that needs no files")
    seq_length: int = option(0, "--seq-length", "tokens in a sequence")
    num_workers: int | None = option(
        None,
        "--num-workers",
        "processes that read data ahead, for each process of the job; 0: each reads for itself when it needs to; "
        "default: 2 with a GPU, 0 without",
    )
    dataloader_type: str = option(
        "single",
        "--dataloader-type",
        "single: each sample of the index once, in its order; cyclic: again and again, each time in another random "
        "order; external is refused",
        choices=("single", "cyclic", "external"),
    )
    data_sharding: bool = option(
        True,
        "--data-sharding",
        "cyclic: each data parallel rank shuffles a share of its own, so that the order depends on the layout",
        off_flag="--no-data-sharding",
    )
    tokenizer_type: str | None = option(
        None,
        "--tokenizer-type",
        "kind of tokenizer (GPT2BPETokenizer where --vocab-file and --merge-file are given; of BERT "
        "BertWordPieceLowerCase where --vocab-file is)",
        choices=(
            "HuggingFaceTokenizer",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
            "GPT2BPETokenizer",
            "TikTokenizer",
            "BertWordPieceLowerCase",
            "BertWordPieceCase",
            "NullTokenizer",
        ),
    )
    tokenizer_model: str | None = option(
        None, "--tokenizer-model", "tokenizer.json, its folder, a SentencePiece model, or a tiktoken file"
    )
    vocab_file: str | None = option(None, "--vocab-file", "vocab.json of GPT2BPETokenizer, vocab.txt of BERT's")
    merge_file: str | None = option(None, "--merge-file", "merges.txt of GPT2BPETokenizer")
    vocab_extra_ids: int = option(
        0, "--vocab-extra-ids", "sentinel tokens for T5, appended by SentencePieceTokenizer and BERT's tokenizers"
    )
    tokenizer_sentencepiece_legacy: bool = option(
        False,
        "--tokenizer-sentencepiece-legacy",
        "SentencePieceTokenizer appends <CLS>, <SEP>, <EOD>, <MASK>, and <EOD> ends documents, as in older Megatron; "
        "always so with --vocab-extra-ids",
    )
    null_tokenizer_eod_id: int | None = option(
        None,
        "--null-tokenizer-eod-id",
        "token of NullTokenizer that ends a document; default: one more than the others",
    )
    tiktoken_pattern: str | None = option(
        None,
        "--tiktoken-pattern",
        "how TikTokenizer cuts text into words; default: as the file says",
        choices=("v1", "v2", "gpt2", "cl100k", "o200k", "qwen"),
    )
    tiktoken_num_special_tokens: int = option(
        1000, "--tiktoken-num-special-tokens", "ids that TikTokenizer sets aside before a list of tokens (.json)"
    )
    tiktoken_special_tokens: list[str] = option(  # noqa: RUF009 (a fresh list for each tree: see `option`)
        [], "--tiktoken-special-tokens", "special tokens of TikTokenizer, where they are not the usual ones"
    )
    reset_position_ids: bool = option(False, "--reset-position-ids", "positions start again after each end of document")
    reset_attention_mask: bool = option(False, "--reset-attention-mask", "no attention across an end of document")
    eod_mask_loss: bool = option(False, "--eod-mask-loss", "end-of-document tokens do not count in the loss")
    mask_prob: float = option(0.15, "--mask-prob", "share of the tokens that BERT is to find")
    short_seq_prob: float = option(
        0.1, "--short-seq-prob", "share of BERT's samples that are cut at a random length, as texts in use are"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading."""

    save: str | None = option(None, "--save", "folder for checkpoints")
    load: str | None = option(
        None, "--load", "folder to resume from, written under any layout; starts afresh if it holds none"
    )
    allow_data_change: bool = option(
        False,
        "--allow-data-change",
        "resume although the order of the samples is no longer that of the run that saved the checkpoint",
    )
    ckpt_step: int | None = option(
        None, "--ckpt-step", "iteration whose checkpoint is loaded; default: the newest that is there"
    )
    allow_fallback: bool = option(
        False, "--allow-fallback", "go back to the checkpoint before where the newest is damaged"
    )
    allow_model_change: bool = option(
        False,
        "--allow-model-change",
        "load weights although they were those of another model; their tensors must fit all the same",
    )
    finetune: bool = option(
        False,
        "--finetune",
        "begin a new run with the weights of --load: step, data, optimizer and schedules start anew",
    )
    pretrained_checkpoint: str | None = option(
        None,
        "--pretrained-checkpoint",
        "folder whose weights a new run begins with where --load holds no checkpoint: the same command goes on later",
    )
    load_hf: str | None = option(
        None,
        "--load-hf",
        "Hugging Face folder whose model, weights and tokenizer a new run begins with where --load holds no checkpoint",
    )
    no_load_optim: bool = option(
        False,
        "--no-load-optim",
        "continue from --load at its step, with a new optimizer and a new schedule of the learning rate",
    )
    no_save_optim: bool = option(
        False, "--no-save-optim", "save weights and counters without the optimizer: a third of the size"
    )
    use_checkpoint_args: bool = option(
        False,
        "--use-checkpoint-args",
        "take the model from the checkpoint, whatever the flags say; also sequence length and tokenizer, where none "
        "names them",
    )
    exit_on_missing_checkpoint: bool = option(
        False, "--exit-on-missing-checkpoint", "refuse to start where --load holds no checkpoint"
    )
    save_hf: str | None = option(
        None,
        "--save-hf",
        "folder that takes a Hugging Face folder iter_NNNNNNN of the last checkpoint, in the run's precision",
    )
    save_hf_interval: int | None = option(
        None, "--save-hf-interval", "steps between further checkpoints that are written to --save-hf, too"
    )
    save_interval: int | None = option(None, "--save-interval", "steps between checkpoints; default: only at the end")
    non_persistent_save_interval: int | None = option(
        None,
        "--non-persistent-save-interval",
        "steps between further checkpoints, which go once two newer ones are there",
    )
    save_retain_interval: int | None = option(
        None,
        "--save-retain-interval",
        "keep checkpoints whose step this divides; others go once two newer ones are there",
    )
    save_keep_last: int | None = option(
        None, "--save-keep-last", "keep this many of the newest checkpoints, besides those of --save-retain-interval"
    )
    async_save: bool = option(
        False,
        "--async-save",
        "copy what is saved to the host's memory and write it in the background while training goes on",
    )

    @property
    def gives_model(self) -> bool:
        """Whether the model is what a folder holds, not what flags say."""
        return self.use_checkpoint_args or self.load_hf is not None


@dataclass(frozen=True)
class PlanConfig:
    """What is told instead of training."""

    dry_run: bool = option(
        False,
        "--dry-run",
        "print what the run needs and does (memory, schedule, messages, time, better layouts) and leave; needs no GPU",
    )
    world_size: int | None = option(
        None, "--world-size", "with --dry-run: processes of the run; default: those that are there"
    )
    gpu_type: str | None = option(
        None,
        "--gpu-type",
        "with --dry-run: the GPU it is for; default: H100",
        choices=("A100-40", "A100-80", "H100", "H200", "B200", "L40S", "RTX-4090"),
    )
    json: bool = option(False, "--json", "with --dry-run: print the plan as JSON")
    print_config: bool = option(
        False, "--print-config", "print what differs from the defaults, as a file for --config, and leave"
    )


@dataclass(frozen=True)
class Config:
    """Everything about a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
