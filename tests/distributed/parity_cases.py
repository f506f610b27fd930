"""The parity matrix: layouts x features over 1, 2, 4 and 8 processes."""

from __future__ import annotations

from tests.distributed.parity import GPT, LLAMA, Case

SHARDED = {"parallel.use_distributed_optimizer": True}
OVERLAPPED = SHARDED | {
    "parallel.overlap_grad_reduce": True,
    "parallel.overlap_param_gather": True,
    "parallel.ddp_bucket_size": 2000,
}
OVERLAPPED_ALL_REDUCE = {"parallel.overlap_grad_reduce": True, "parallel.ddp_bucket_size": 2000}
NO_SEQUENCE_PARALLEL = {"parallel.sequence_parallel": False}
TWO_STAGES = {"parallel.num_virtual_stages_per_pipeline_rank": 2}
GPIPE = {"parallel.pipeline_schedule": "gpipe"}
DROPOUT = {"model.hidden_dropout": 0.2, "model.attention_dropout": 0.1}
TIED = {"model.tie_embeddings": True}
UNTIED = {"model.tie_embeddings": False}
ODD_VOCABULARY = {"model.vocab_size": 51}
CLIPPED = {"optimizer.clip_grad": 0.5}
FULL = {"training.recompute_granularity": "full"}
SELECTIVE = {"training.recompute_granularity": "selective"}
RUNS_OF_TWO = FULL | {"training.recompute_num_layers": 2}
ONE_OF_EACH_STAGE = FULL | {"training.recompute_method": "block"}
BOTH_MODULES = SELECTIVE | {"training.recompute_modules": ["core_attn", "mlp"]}
ONE_PER_MICRO_BATCH = {"training.micro_batch_size": 1}
IN_CHUNKS = {"training.loss_chunk_size": 5}
REGULARISED = {"training.label_smoothing": 0.1, "training.z_loss_coeff": 0.02}
TWO_PER_MICRO_BATCH = {"training.micro_batch_size": 2}
FOUR_PER_MICRO_BATCH = {"training.micro_batch_size": 4}
EIGHT_LAYERS = {"model.num_layers": 8}
SEVEN_LAYERS = {"model.num_layers": 7}
ONE_GROUP = {"model.group_query_attention": True, "model.num_query_groups": 1}
FIRST_HOLDS_THREE = {"parallel.decoder_first_pipeline_num_layers": 3}
ENDS_ACCOUNTED = {
    "parallel.account_for_embedding_in_pipeline_split": True,
    "parallel.account_for_loss_in_pipeline_split": True,
}
GROUPS_OF_THREE = {"parallel.microbatch_group_size_per_virtual_pipeline_stage": 3}
SINUSOIDAL = {"model.position_embedding_type": "sinusoidal"}
NO_POSITIONS = {"model.position_embedding_type": "none"}
LLAMA_3_ROTARY = {
    "model.use_rope_scaling": True,
    "model.rope_scaling_original_length": 8,
    "model.rotary_seq_len_interpolation_factor": 2.0,
}
QK_NORM = {"model.qk_layernorm": True}
ZERO_CENTERED = {"model.apply_layernorm_1p": True}
WINDOW = {"model.window_size": "4,0"}
QWEN_3 = LLAMA | QK_NORM | {"model.kv_channels": 12}
XAVIER = {"model.init_method_xavier_uniform": True, "model.embedding_init_method_std": 0.5}
GEMMA = (
    LLAMA | ZERO_CENTERED | {"model.activation": "geglu", "model.scale_embeddings": True, "model.tie_embeddings": True}
)
NEOX = GPT | {
    "model.position_embedding_type": "rope",
    "model.rotary_percent": 0.5,
    "model.parallel_residual": True,
    "model.tie_embeddings": False,
}
POST_NORM = {"model.apply_residual_connection_post_layernorm": True}
BERT = GPT | POST_NORM
ROTARY = {"model.position_embedding_type": "rope"}
NO_BINARY_HEAD = {"model.bert_binary_head": False}
PARTIAL_INTERLEAVED = {"model.rotary_percent": 0.5, "model.rotary_interleaved": True}
GEGLU = {"model.activation": "geglu"}
SQUARED_RELU = {"model.activation": "squared_relu"}
THREE_GROUPS = {
    "model.hidden_size": 48,
    "model.num_attention_heads": 6,
    "model.group_query_attention": True,
    "model.num_query_groups": 3,
}
SGD = {
    "optimizer.optimizer": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.weight_decay_incr_style": "cosine",
    "optimizer.start_weight_decay": 0.0,
    "optimizer.end_weight_decay": 0.5,
}
DECOUPLED = {
    "optimizer.decoupled_lr": 5e-3,
    "optimizer.lr_decay_style": "WSD",
    "optimizer.lr_wsd_decay_iters": 95,
    "optimizer.lr_warmup_iters": 3,
}

CASES = [
    # one process
    Case("llama, micro-batch 1", LLAMA, layout=ONE_PER_MICRO_BATCH),
    Case("llama, micro-batch 2", LLAMA, layout=TWO_PER_MICRO_BATCH),
    Case("gpt, both dropouts, micro-batch 4", GPT | DROPOUT, layout=FOUR_PER_MICRO_BATCH),
    Case("gpt, full recompute", GPT | DROPOUT, layout=FULL),
    Case("gpt, selective recompute", GPT | DROPOUT, layout=SELECTIVE),
    Case("llama, full recompute, ragged mask", LLAMA, layout=FULL, mask="ragged"),
    # two processes
    Case("llama, tensor", LLAMA, tp=2),
    Case("llama, tensor, no sequence parallelism", LLAMA, tp=2, layout=NO_SEQUENCE_PARALLEL),
    Case("gpt tied, tensor, vocabulary 51", GPT | ODD_VOCABULARY, tp=2),
    Case(
        "gpt tied, tensor, vocabulary 51, loss in chunks, smoothed, z-loss, ragged mask",
        GPT | ODD_VOCABULARY | REGULARISED,
        tp=2,
        layout=TWO_PER_MICRO_BATCH | IN_CHUNKS,
        mask="ragged",
    ),
    Case(
        "gpt tied, tensor, vocabulary 51, no sequence parallelism",
        GPT | ODD_VOCABULARY,
        tp=2,
        layout=NO_SEQUENCE_PARALLEL,
    ),
    Case("gpt, tensor, both dropouts", GPT | DROPOUT, tp=2, layout=TWO_PER_MICRO_BATCH),
    Case("gpt, tensor, both dropouts, no sequence parallelism", GPT | DROPOUT, tp=2, layout=NO_SEQUENCE_PARALLEL),
    Case("gpt, tensor, multi-query (1 group)", GPT | ONE_GROUP, tp=2),
    Case("gpt, tensor 2, three query groups", GPT | THREE_GROUPS, tp=2, layout=NO_SEQUENCE_PARALLEL),
    Case("gpt, tensor, sinusoidal positions, geglu, selective", GPT | SINUSOIDAL | GEGLU, tp=2, layout=BOTH_MODULES),
    Case("llama, tensor, rotary scaled, partial, interleaved", LLAMA | LLAMA_3_ROTARY | PARTIAL_INTERLEAVED, tp=2),
    Case("qwen 3, tensor", QWEN_3, tp=2),
    Case(
        "qwen 3, tensor, no sequence parallelism, zero-centred",
        QWEN_3 | ZERO_CENTERED,
        tp=2,
        layout=NO_SEQUENCE_PARALLEL,
    ),
    Case("gemma, tensor, window", GEMMA | WINDOW, tp=2, layout=TWO_PER_MICRO_BATCH),
    Case("gpt-neox, tensor, both dropouts", NEOX | DROPOUT, tp=2, layout=FOUR_PER_MICRO_BATCH),
    Case("gpt, post-norm, zero-centred, 1f1b", GPT | POST_NORM | ZERO_CENTERED, pp=2),
    Case("llama, 1f1b", LLAMA, pp=2),
    Case("llama, gpipe, loss in chunks", LLAMA, pp=2, layout=GPIPE | IN_CHUNKS),
    Case("gpt tied, gpipe", GPT, pp=2, layout=GPIPE),
    Case("gpt tied, gpipe, sgd, growing weight decay", GPT | SGD, pp=2, layout=GPIPE),
    Case("gpt tied, interleaved", GPT | DROPOUT, pp=2, layout=TWO_STAGES),
    Case("llama, 7 layers, interleaved, vocabulary 51", LLAMA | SEVEN_LAYERS | ODD_VOCABULARY, pp=2, layout=TWO_STAGES),
    Case("llama, data", LLAMA, dp=2),
    Case("llama, data, sharded", LLAMA, dp=2, layout=SHARDED),
    Case("gpt, data, sharded, overlapped, delayed", GPT, dp=2, layout=OVERLAPPED, delayed=True),
    Case("gpt, data, overlapped all-reduce, delayed", GPT | DROPOUT, dp=2, layout=OVERLAPPED_ALL_REDUCE, delayed=True),
    Case("gpt, data, ragged mask, clipped", GPT | CLIPPED, dp=2, mask="ragged", layout=SHARDED | FOUR_PER_MICRO_BATCH),
    Case("bert, post-norm, tensor, both dropouts", BERT | DROPOUT, tp=2, kind="bert"),
    Case(
        "bert, tensor, no sequence parallelism, vocabulary 51",
        BERT | ODD_VOCABULARY,
        tp=2,
        layout=NO_SEQUENCE_PARALLEL,
        kind="bert",
    ),
    Case(
        "bert, rotary, no binary head, smoothed, z-loss, 1f1b",
        BERT | ROTARY | NO_BINARY_HEAD | DROPOUT | REGULARISED,
        pp=2,
        kind="bert",
    ),
    Case("bert, rotary, no binary head, tensor", BERT | ROTARY | NO_BINARY_HEAD, tp=2, layout=IN_CHUNKS, kind="bert"),
    Case("bert, pre-norm, interleaved", GPT, pp=2, layout=TWO_STAGES | TWO_PER_MICRO_BATCH, kind="bert"),
    # four processes
    Case("llama, tensor 4, fewer groups than ranks", LLAMA, tp=4, layout=TWO_PER_MICRO_BATCH),
    Case(
        "llama, tensor 4, fewer groups, no sequence parallelism",
        LLAMA,
        tp=4,
        layout=NO_SEQUENCE_PARALLEL | FOUR_PER_MICRO_BATCH,
    ),
    Case(
        "gpt, tensor 4, multi-query, both dropouts",
        GPT | ONE_GROUP | DROPOUT,
        tp=4,
        layout=SELECTIVE | FOUR_PER_MICRO_BATCH,
    ),
    Case(
        "qwen 3, tensor 4, fewer groups than ranks, window",
        QWEN_3 | WINDOW | DROPOUT,
        tp=4,
        layout=FOUR_PER_MICRO_BATCH,
    ),
    Case("gpt tied, pipeline 4", GPT, pp=4),
    Case("llama, 8 layers, pipeline 4, interleaved", LLAMA | EIGHT_LAYERS, pp=4, layout=TWO_STAGES),
    Case(
        "gpt, 7 layers, pipeline 4, no positions, block recompute",
        GPT | SEVEN_LAYERS | NO_POSITIONS,
        pp=4,
        layout=ONE_OF_EACH_STAGE,
    ),
    Case("gpt tied, pipeline 2 data 2, sharded", GPT, pp=2, dp=2, layout=SHARDED),
    Case("gpt tied, pipeline 2 data 2, sharded, overlapped, delayed", GPT, pp=2, dp=2, layout=OVERLAPPED, delayed=True),
    Case(
        "gpt tied, interleaved, data 2, overlapped all-reduce, delayed",
        GPT | DROPOUT,
        pp=2,
        dp=2,
        layout=OVERLAPPED_ALL_REDUCE | TWO_STAGES,
        delayed=True,
    ),
    Case("gpt tied, tensor 2 data 2, sharded, clipped", GPT | CLIPPED, tp=2, dp=2, layout=SHARDED),
    Case(
        "gpt, tensor 2 data 2, ragged mask, vocabulary 51",
        GPT | ODD_VOCABULARY,
        tp=2,
        dp=2,
        mask="ragged",
    ),
    Case(
        "llama, tensor 2 pipeline 2, clipped, dropout",
        LLAMA | CLIPPED | DROPOUT,
        tp=2,
        pp=2,
        layout=TWO_PER_MICRO_BATCH,
    ),
    Case(
        "gpt tied, tensor 2 pipeline 2, no sequence parallelism, loss in chunks",
        GPT | CLIPPED,
        tp=2,
        pp=2,
        layout=NO_SEQUENCE_PARALLEL | IN_CHUNKS,
    ),
    Case("gpt tied, pipeline 2 data 2, sharded, decoupled rate", GPT | DECOUPLED, pp=2, dp=2, layout=SHARDED),
    Case("llama, tensor 2 data 2, sharded, decoupled rate", LLAMA | DECOUPLED, tp=2, dp=2, layout=SHARDED),
    Case("llama, data 4, sharded, ragged mask", LLAMA, dp=4, layout=SHARDED, mask="ragged"),
    Case("llama, first rank 3 of 4 layers", LLAMA, pp=2, layout=FIRST_HOLDS_THREE),
    Case("gpt tied, 2 layers, ends accounted for", GPT | {"model.num_layers": 2}, pp=4, layout=ENDS_ACCOUNTED),
    Case(
        "llama, stages of 2, 0, 2 and 0 layers",
        LLAMA,
        pp=4,
        layout={"parallel.pipeline_model_parallel_layout": "Ett||tt|L"},
    ),
    Case(
        "gpt tied, 5 layers, laid out over virtual stages, groups of 3",
        GPT | DROPOUT | {"model.num_layers": 5},
        pp=2,
        layout=TWO_STAGES | GROUPS_OF_THREE | {"parallel.pipeline_model_parallel_layout": "E|tt|ttt|L"},
    ),
    # eight processes, every axis at once
    Case(
        "bert, all axes, sharded, selective, loss in chunks, smoothed, z-loss",
        BERT | DROPOUT | ODD_VOCABULARY | REGULARISED,
        tp=2,
        pp=2,
        dp=2,
        layout=SHARDED | BOTH_MODULES | IN_CHUNKS,
        kind="bert",
    ),
    Case("llama, all axes, interleaved, sharded", LLAMA, tp=2, pp=2, dp=2, layout=SHARDED | TWO_STAGES),
    Case(
        "gpt tied, all axes, interleaved, sharded, overlapped, delayed",
        GPT | DROPOUT | ODD_VOCABULARY,
        tp=2,
        pp=2,
        dp=2,
        layout=OVERLAPPED | TWO_STAGES,
        delayed=True,
    ),
    Case(
        "gpt tied, all axes, ragged mask, clipped, full recompute",
        GPT | CLIPPED | DROPOUT,
        tp=2,
        pp=2,
        dp=2,
        mask="ragged",
        layout=SHARDED | RUNS_OF_TWO,
    ),
    Case(
        "gpt tied, all axes, no sequence parallelism",
        GPT | ODD_VOCABULARY | CLIPPED,
        tp=2,
        pp=2,
        dp=2,
        layout=NO_SEQUENCE_PARALLEL | SHARDED,
    ),
    Case(
        "gpt untied, all axes, gpipe, squared relu, xavier",
        GPT | UNTIED | SQUARED_RELU | XAVIER,
        tp=2,
        pp=2,
        dp=2,
        layout=GPIPE,
    ),
    Case("llama tied, tensor 4, pipeline 2", LLAMA | TIED, tp=4, pp=2, layout=FOUR_PER_MICRO_BATCH),
    Case(
        "llama, tensor 2, data 4, sharded, overlapped",
        LLAMA | CLIPPED,
        tp=2,
        dp=4,
        layout=OVERLAPPED,
    ),
    Case("llama, 7 layers, pipeline 4, data 2, sharded", LLAMA | SEVEN_LAYERS, pp=4, dp=2, layout=SHARDED),
]
