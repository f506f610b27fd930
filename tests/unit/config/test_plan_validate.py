"""Every rule of the validation: it fires, names its flag, says what to do, and is silent once that is done."""

from __future__ import annotations

import math

import pytest

from megallm.config import Config, resolve
from megallm.config.dictionary import build
from megallm.config.fields import REQUIRED, all_fields
from megallm.plan import (
    rules_batches,
    rules_bert,
    rules_data,
    rules_logging,
    rules_model,
    rules_parallel,
    rules_plan,
    rules_rates,
    rules_run,
    rules_stages,
    rules_values,
)
from megallm.plan.problem import Rule, divisors_near, multiples_near
from megallm.plan.rules_values import RANGES
from megallm.plan.validate import RULES, VALUE_RULES, check, found_by_rule, validate

SOUND = {
    "model.num_layers": 4,
    "model.hidden_size": 48,
    "model.num_attention_heads": 12,
    "training.micro_batch_size": 2,
    "training.train_iters": 100,
    "optimizer.lr": 1e-3,
    "data.seq_length": 64,
    "data.mock_data": True,
    "data.tokenizer_type": "NullTokenizer",
    "model.vocab_size": 100,
}
TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
VIRTUAL = "parallel.num_virtual_stages_per_pipeline_rank"
ROPE = {"model.position_embedding_type": "rope"}
GROUP = "parallel.microbatch_group_size_per_virtual_pipeline_stage"
STAGES = "parallel.pipeline_model_parallel_layout"
FIRST, LAST = "parallel.decoder_first_pipeline_num_layers", "parallel.decoder_last_pipeline_num_layers"
ACCOUNTED = {
    "parallel.account_for_embedding_in_pipeline_split": True,
    "parallel.account_for_loss_in_pipeline_split": True,
}
RAMP, STAIRS = "training.rampup_batch_size", "training.step_batch_size_schedule"
FILES = {"data.mock_data": False, "data.data_path": ["corpus"]}
BERT = {"model.architecture": "bert"}
OWN = {"data.mock_data": False, "data.train_data_path": ["corpus"], "data.valid_data_path": ["held_out"]}

# rule -> cases of (world size, what breaks it, what its message proposes). The proposal must stand in the message.
CASES: dict[str, list[tuple[int, dict, dict]]] = {
    "required_value_is_given": [
        (1, {"model.num_layers": 0}, {"model.num_layers": 12}),
        (1, {"model.hidden_size": 0}, {"model.hidden_size": 768}),
        (1, {"model.num_attention_heads": 0}, {"model.num_attention_heads": 12}),
        (1, {"training.micro_batch_size": 0}, {"training.micro_batch_size": 1}),
        (1, {"training.train_iters": 0}, {"training.train_iters": 1000}),
        (1, {"optimizer.lr": 0.0}, {"optimizer.lr": "3e-4"}),
        (1, {"data.seq_length": 0}, {"data.seq_length": 1024}),
        (1, {"data.tokenizer_type": None}, {"data.tokenizer_type": "HuggingFaceTokenizer"}),
    ],
    "number_is_in_range": [
        (1, {"model.num_layers": -3}, {"model.num_layers": 1}),
        (1, {"model.attention_dropout": 1.0}, {"model.attention_dropout": 0.0}),
        (1, {"optimizer.adam_beta2": 1.5}, {"optimizer.adam_beta2": 0.999}),
        (1, {"optimizer.adam_beta1": -0.1}, {"optimizer.adam_beta1": 0.0}),
        (1, {"optimizer.adam_eps": 0.0}, {"optimizer.adam_eps": 1e-08}),
        (1, {"optimizer.lr": -1e-3}, {"optimizer.lr": 0.0001}),
        (1, {"optimizer.weight_decay": math.inf}, {"optimizer.weight_decay": 0.0}),
        (1, {"optimizer.clip_grad": math.nan}, {"optimizer.clip_grad": 0.0}),
        (1, {"training.seed": 2**32}, {"training.seed": 4294967295}),
        (1, {"training.label_smoothing": 1.0}, {"training.label_smoothing": 0.0}),
        (1, {"model.vocab_size": -1}, {"model.vocab_size": 1}),
        (1, {"training.exit_interval": 0}, {"training.exit_interval": 1}),
    ],
    "text_is_a_choice": [
        (1, {"model.activation": "gelux"}, {"model.activation": "gelu"}),
        (1, {"data.tokenizer_type": "NulTokenizer"}, {"data.tokenizer_type": "NullTokenizer"}),
    ],
    "heads_divide_hidden_size": [
        (1, {"model.num_attention_heads": 7}, {"model.num_attention_heads": 6}),
        (1, {"model.num_attention_heads": 7}, {"model.hidden_size": 49}),
    ],
    "query_groups_are_asked_for": [
        (1, {"model.num_query_groups": 4}, {"model.group_query_attention": True}),
    ],
    "query_groups_are_numbered": [
        (1, {"model.group_query_attention": True}, {"model.num_query_groups": 1}),
    ],
    "query_groups_divide_heads": [
        (1, {"model.group_query_attention": True, "model.num_query_groups": 5}, {"model.num_query_groups": 4}),
        (1, {"model.group_query_attention": True, "model.num_query_groups": 5}, {"model.num_attention_heads": 15}),
    ],
    "tensor_size_divides_heads": [
        (8, {TENSOR: 8}, {TENSOR: 6}),
        (8, {TENSOR: 8}, {"model.num_attention_heads": 16}),
    ],
    "tensor_size_divides_query_groups": [
        (
            12,
            {TENSOR: 12, "model.group_query_attention": True, "model.num_query_groups": 2, "model.kv_channels": 5},
            {TENSOR: 10},
        ),
        (
            12,
            {TENSOR: 12, "model.group_query_attention": True, "model.num_query_groups": 2, "model.kv_channels": 5},
            {"model.num_query_groups": 12},
        ),
    ],
    "default_ffn_is_not_empty": [
        (
            1,
            {"model.activation": "swiglu", "model.hidden_size": 16, "model.num_attention_heads": 4},
            {"model.ffn_hidden_size": 64},
        ),
        (
            1,
            {"model.activation": "geglu", "model.hidden_size": 16, "model.num_attention_heads": 4},
            {"model.hidden_size": 24},
        ),
    ],
    "tensor_size_divides_ffn": [
        (4, {TENSOR: 4, "model.ffn_hidden_size": 90}, {"model.ffn_hidden_size": 92}),
        (4, {TENSOR: 4, "model.ffn_hidden_size": 90}, {TENSOR: 3}),
    ],
    "positions_reach_sequence_length": [
        (1, {"model.max_position_embeddings": 32}, {"model.max_position_embeddings": 64}),
        (1, {"model.max_position_embeddings": 32}, {"data.seq_length": 32}),
    ],
    "rotary_width_is_even": [
        (1, ROPE | {"model.kv_channels": 5}, {"model.kv_channels": 6}),
        (1, ROPE | {"model.kv_channels": 48, "model.rotary_percent": 0.32}, {"model.rotary_percent": 0.3334}),
        (1, ROPE | {"model.kv_channels": 8, "model.rotary_percent": 0.1}, {"model.rotary_percent": 0.25}),
    ],
    "rotary_settings_act": [
        (1, {"model.rotary_percent": 0.5}, {"model.position_embedding_type": "rope"}),
        (1, {"model.rotary_interleaved": True}, {"model.position_embedding_type": "rope"}),
        (1, {"model.rotary_seq_len_interpolation_factor": 2.0}, {"model.position_embedding_type": "rope"}),
        (1, {"model.use_rope_scaling": True}, {"model.position_embedding_type": "rope"}),
    ],
    "recompute_settings_act": [
        (1, {"training.recompute_method": "block"}, {"training.recompute_granularity": "full"}),
        (
            1,
            {"training.recompute_granularity": "selective", "training.recompute_num_layers": 2},
            {"training.recompute_granularity": "full"},
        ),
        (
            1,
            {"training.recompute_granularity": "full", "training.recompute_modules": ["mlp"]},
            {"training.recompute_granularity": "selective"},
        ),
    ],
    "recomputed_modules_are_known": [
        (
            1,
            {"training.recompute_granularity": "selective", "training.recompute_modules": ["mlp", "layernorm"]},
            {"training.recompute_modules": ["core_attn", "mlp"]},
        ),
    ],
    "window_is_two_numbers": [
        (1, {"model.window_size": "4096"}, {"model.window_size": "1023,0"}),
        (1, {"model.window_size": "many,0"}, {"model.window_size": "1023,0"}),
        (1, {"model.window_size": "-2,0"}, {"model.window_size": "1023,0"}),
        (1, {"model.window_size": "(128,128)"}, {"model.window_size": "1023,0"}),
    ],
    "one_kind_of_residual": [
        (
            1,
            {"model.parallel_residual": True, "model.apply_residual_connection_post_layernorm": True},
            {"model.parallel_residual": False},
        ),
    ],
    "rope_scaling_fades": [
        (
            1,
            ROPE | {"model.use_rope_scaling": True, "model.rope_scaling_low_freq_factor": 4.0},
            {"model.rope_scaling_high_freq_factor": 16},
        ),
        (
            1,
            ROPE | {"model.use_rope_scaling": True, "model.rope_scaling_high_freq_factor": 0.5},
            {"model.rope_scaling_low_freq_factor": 0.125},
        ),
    ],
    "sinusoidal_width_is_even": [
        (
            1,
            {
                "model.position_embedding_type": "sinusoidal",
                "model.hidden_size": 49,
                "model.num_attention_heads": 7,
            },
            {"model.hidden_size": 50},
        ),
    ],
    "layout_divides_world": [
        (8, {TENSOR: 3}, {TENSOR: 4}),
        (8, {PIPELINE: 3}, {PIPELINE: 2}),
        (2, {TENSOR: 4}, {TENSOR: 2}),
    ],
    "global_batch_divides": [
        (2, {"training.global_batch_size": 10}, {"training.global_batch_size": 8}),
        (2, {"training.global_batch_size": 10}, {"training.micro_batch_size": 5}),
        (4, {"training.global_batch_size": 3}, {"training.global_batch_size": 8}),
    ],
    "ramp_up_leads_to_the_global_batch": [
        (1, {RAMP: words, "training.global_batch_size": 64}, {RAMP: ["16", "16", "1000000"]})
        for words in (["16", "16"], ["16", "x", "100"], ["16", "0", "100"], ["16", "20", "100"], ["80", "16", "100"])
    ]
    + [(1, {RAMP: ["16", "16", "100"]}, {"training.global_batch_size": 1024})],
    "stairs_of_batches_are_whole": [
        (1, {STAIRS: text}, {STAIRS: "0:768 250B:1536"})
        for text in ("", "768", "640:768", "0:768 x:8", "0:0", "0:768 640:8 650:16", "0:8 inf:16", "0:8 nan:4")
    ]
    + [(1, {STAIRS: "0:8 2K:32", "training.global_batch_size": 16}, {"training.global_batch_size": 32})],
    "one_way_to_change_the_batch": [
        (1, {STAIRS: "0:8 2K:32", RAMP: ["16", "16", "100"], "training.global_batch_size": 32}, {RAMP: []}),
    ],
    "changing_batches_divide": [
        (2, {RAMP: ["6", "2", "60"], "training.global_batch_size": 16}, {"training.micro_batch_size": 1}),
        (4, {STAIRS: "0:4 2K:16"}, {"training.micro_batch_size": 1}),
    ],
    "virtual_stages_need_pipeline": [
        (2, {VIRTUAL: 2}, {PIPELINE: 2}),
        (2, {VIRTUAL: 2}, {VIRTUAL: 1}),
    ],
    "layers_fill_stages": [
        (2, {PIPELINE: 2, VIRTUAL: 3}, {"model.num_layers": 6}),
        (2, {PIPELINE: 2, VIRTUAL: 3}, {VIRTUAL: 2}),
        (8, {PIPELINE: 8}, {PIPELINE: 4}),
        (8, {PIPELINE: 8, **ACCOUNTED}, {"model.num_layers": 6}),
    ],
    "schedule_fits_virtual_stages": [
        (2, {PIPELINE: 2, "parallel.pipeline_schedule": "interleaved"}, {VIRTUAL: 2}),
        (2, {PIPELINE: 2, VIRTUAL: 2, "parallel.pipeline_schedule": "gpipe"}, {VIRTUAL: 1}),
        (
            2,
            {PIPELINE: 2, VIRTUAL: 2, "parallel.pipeline_schedule": "1f1b"},
            {"parallel.pipeline_schedule": "interleaved"},
        ),
    ],
    "micro_batch_groups_fill_the_pipeline": [
        (4, {PIPELINE: 4, GROUP: 3}, {GROUP: 4}),
    ],
    "one_way_to_split_the_layers": [
        (2, {PIPELINE: 2, FIRST: 1, **ACCOUNTED}, dict.fromkeys(ACCOUNTED, False)),
        (2, {PIPELINE: 2, STAGES: "Et|tttL", FIRST: 1}, {FIRST: None}),
    ],
    "layout_of_stages_holds_the_model": [
        *((2, {PIPELINE: 2, STAGES: text}, {STAGES: None}) for text in ("", "Ett|tt", "tt|ttL", "Ett|xttL", "EttL|tt")),
        (2, {PIPELINE: 2, STAGES: "Ett|m|ttL"}, {STAGES: None}),
        (2, {PIPELINE: 2, STAGES: "Et|t|t|tL"}, {VIRTUAL: 2}),
        (2, {PIPELINE: 2, STAGES: "Ett|tttL"}, {"model.num_layers": 5}),
    ],
    "given_layers_leave_enough": [
        (1, {FIRST: 2}, {FIRST: None}),
        (1, {FIRST: 2}, {PIPELINE: 2}),
        (2, {PIPELINE: 2, LAST: 4}, {LAST: 3}),
        (2, {PIPELINE: 2, VIRTUAL: 2, FIRST: 1}, {FIRST: 2}),
        (2, {PIPELINE: 2, FIRST: 1, LAST: 2}, {FIRST: 2}),
        (4, {PIPELINE: 4, FIRST: 3}, {FIRST: 1}),
    ],
    "tensor_size_divides_sequence": [
        (4, {TENSOR: 4, "data.seq_length": 66}, {"data.seq_length": 68}),
        (4, {TENSOR: 4, "data.seq_length": 66}, {"parallel.sequence_parallel": False}),
    ],
    "param_gather_overlap_needs_distributed_optimizer": [
        (1, {"parallel.overlap_param_gather": True}, {"parallel.use_distributed_optimizer": True}),
    ],
    "backend_runs_on_device": [
        (
            1,
            {"parallel.distributed_backend": "nccl", "training.device": "cpu"},
            {"parallel.distributed_backend": "gloo"},
        ),
    ],
    "operators_are_known": [
        (1, {"training.ops": ["fast"]}, {"training.ops": ["native"]}),
        (1, {"training.ops": ["norm=native"]}, {"training.ops": ["rms_norm=native"]}),
    ],
    "one_precision": [
        (1, {"training.bf16": True, "training.fp64": True}, {"training.bf16": False}),
        (1, {"training.bf16": True, "training.fp16": True}, {"training.bf16": False}),
    ],
    "loss_scale_starts_above_its_minimum": [
        (1, {"training.initial_loss_scale": 0.5}, {"training.min_loss_scale": 0.5}),
    ],
    "minimum_is_below_peak": [(1, {"optimizer.min_lr": 0.1}, {"optimizer.min_lr": 0.0001})],
    "warmup_starts_below_peak": [(1, {"optimizer.lr_warmup_init": 0.1}, {"optimizer.lr_warmup_init": 0.0})],
    "warmup_ends_before_decay": [
        (1, {"optimizer.lr_warmup_iters": 101}, {"optimizer.lr_warmup_iters": 100}),
        (1, {"optimizer.lr_warmup_iters": 11, "optimizer.lr_decay_iters": 10}, {"optimizer.lr_decay_iters": 11}),
    ],
    "warmup_samples_end_before_decay": [
        (1, {"optimizer.lr_warmup_samples": 201}, {"optimizer.lr_warmup_samples": 200}),
        (
            1,
            {"training.train_samples": 300, "optimizer.lr_warmup_samples": 301, "training.train_iters": 0},
            {"optimizer.lr_decay_samples": 301},
        ),
        (1, {"optimizer.lr_warmup_iters": 60, "optimizer.lr_decay_samples": 100}, {"optimizer.lr_decay_samples": 120}),
    ],
    "one_unit_of_the_schedule": [
        (1, {"optimizer.lr_warmup_iters": 5, "optimizer.lr_warmup_samples": 10}, {"optimizer.lr_warmup_iters": 0}),
        (1, {"optimizer.lr_decay_iters": 5, "optimizer.lr_decay_samples": 10}, {"optimizer.lr_decay_iters": None}),
        (
            1,
            {"optimizer.lr_warmup_fraction": 0.1, "optimizer.lr_warmup_samples": 10},
            {"optimizer.lr_warmup_fraction": None},
        ),
        (
            1,
            {"optimizer.lr_warmup_fraction": 0.1, "optimizer.lr_warmup_iters": 10},
            {"optimizer.lr_warmup_fraction": None},
        ),
        (
            1,
            {"optimizer.lr_wsd_decay_iters": 5, "optimizer.lr_wsd_decay_samples": 10},
            {"optimizer.lr_wsd_decay_iters": None},
        ),
    ],
    "stable_learning_rate_decays_at_the_end": [
        (1, {"optimizer.lr_decay_style": "WSD"}, {"optimizer.lr_decay_style": "cosine"}),
        (
            1,
            {
                "optimizer.lr_decay_style": "WSD",
                "optimizer.lr_wsd_decay_iters": 91,
                "optimizer.lr_warmup_fraction": 0.1,
            },
            {"optimizer.lr_wsd_decay_iters": 90},
        ),
        (
            1,
            {"optimizer.lr_decay_style": "WSD", "optimizer.lr_wsd_decay_samples": 201},
            {"optimizer.lr_wsd_decay_samples": 200},
        ),
    ],
    "decoupled_rate_decays_downwards": [
        (1, {"optimizer.decoupled_min_lr": 0.1}, {"optimizer.decoupled_min_lr": None}),
        (
            1,
            {"optimizer.decoupled_lr": 0.1, "optimizer.decoupled_min_lr": 0.2},
            {"optimizer.decoupled_min_lr": 0.01},
        ),
    ],
    "weight_decay_has_both_ends": [
        (1, {"optimizer.end_weight_decay": 0.1}, {"optimizer.end_weight_decay": None}),
        (
            1,
            {"optimizer.weight_decay_incr_style": "cosine", "optimizer.start_weight_decay": 0.0},
            {"optimizer.end_weight_decay": 0.1},
        ),
    ],
    "one_length_of_the_run": [
        (1, {"training.train_samples": 1, "training.train_iters": 0}, {"training.train_samples": 2}),
        (1, {"training.train_samples": 300}, {"training.train_iters": 0}),
    ],
    "evaluation_has_batches": [
        (1, {"training.eval_interval": 5, "training.eval_iters": 0}, {"training.eval_iters": 10}),
    ],
    "without_training_there_is_evaluation": [
        (1, {"training.skip_train": True}, {"training.eval_interval": 1}),
        (1, {"training.skip_train": True}, {"training.skip_train": False}),
    ],
    "saving_has_a_folder": [
        (1, {"checkpoint.save_interval": 5}, {"checkpoint.save": "FOLDER"}),
        (1, {"checkpoint.async_save": True}, {"checkpoint.save": "FOLDER"}),
    ],
    "exporting_has_a_folder": [
        (1, {"checkpoint.save": "OTHER", "checkpoint.save_hf_interval": 5}, {"checkpoint.save_hf": "FOLDER"}),
    ],
    "one_origin_of_weights": [
        (
            1,
            {"checkpoint.load_hf": "FOLDER", "checkpoint.pretrained_checkpoint": "OTHER"},
            {"checkpoint.pretrained_checkpoint": None},
        ),
        (
            1,
            {"checkpoint.load_hf": "FOLDER", "checkpoint.load": "OTHER", "checkpoint.finetune": True},
            {"checkpoint.load_hf": None},
        ),
    ],
    "loading_has_a_folder": [
        (1, {"checkpoint.ckpt_step": 5}, {"checkpoint.load": "FOLDER"}),
        (1, {"checkpoint.finetune": True}, {"checkpoint.load": "FOLDER"}),
        (1, {"checkpoint.use_checkpoint_args": True}, {"checkpoint.load": "FOLDER"}),
        (
            1,
            {"checkpoint.no_load_optim": True, "checkpoint.pretrained_checkpoint": "OTHER"},
            {"checkpoint.load": "FOLDER"},
        ),
    ],
    "retained_checkpoints_are_saved": [
        (
            1,
            {"checkpoint.save": "FOLDER", "checkpoint.save_interval": 5, "checkpoint.save_retain_interval": 12},
            {"checkpoint.save_retain_interval": 10},
        ),
        (
            1,
            {"checkpoint.save": "FOLDER", "checkpoint.save_retain_interval": 12},
            {"checkpoint.save_interval": 12},
        ),
    ],
    "timeline_step_is_in_the_run": [
        (1, {"logging.timeline": "t", "logging.timeline_step": 101}, {"logging.timeline_step": 100}),
    ],
    "weights_and_biases_is_named": [
        (1, {"logging.wandb_project": "p"}, {"logging.wandb_exp_name": "NAME"}),
        (1, {"logging.wandb_entity": "e", "logging.wandb_exp_name": "n"}, {"logging.wandb_project": "NAME"}),
    ],
    "samples_are_texts": [
        (1, {"logging.sample_interval": 5}, {"logging.sample_interval": None}),
        (
            1,
            {
                "logging.sample_interval": 5,
                "logging.sample_prompt": "",
                "data.tokenizer_type": "HuggingFaceTokenizer",
                "data.tokenizer_model": "tokenizer.json",
            },
            {"logging.sample_prompt": "The"},
        ),
    ],
    "progress_file_has_a_folder": [
        (1, {"logging.log_progress": True}, {"checkpoint.save": "FOLDER"}),
        (1, {"logging.log_progress": True}, {"logging.log_progress": False}),
    ],
    "timers_have_a_level": [
        (1, {"logging.log_timers_to_tensorboard": True}, {"logging.timing_log_level": 1}),
    ],
    "profiled_steps_are_in_the_run": [
        (
            1,
            {"logging.profile": True, "logging.profile_step_start": 5, "logging.profile_step_end": 5},
            {"logging.profile_step_end": 7},
        ),
        (
            1,
            {"logging.profile": True, "training.train_iters": 6},
            {"logging.profile_step_start": 5, "logging.profile_step_end": 6},
        ),
    ],
    "profiled_ranks_exist": [
        (2, {"logging.profile_ranks": ["1", "2"]}, {"logging.profile_ranks": ["0"]}),
        (2, {"logging.profile_ranks": ["-1"]}, {"logging.profile_ranks": ["0"]}),
    ],
    "settings_of_bert_act": [
        (1, {"model.num_token_types": 2}, {"model.num_token_types": None}),
        (1, {"data.mask_prob": 0.3, "model.num_token_types": 2}, BERT),
        (1, {"data.short_seq_prob": 0.0, "model.bert_binary_head": False}, BERT),
    ],
    "settings_of_decoders_act": [
        (1, {**BERT, "model.window_size": "8,0"}, {"model.window_size": None}),
        (1, {**BERT, "data.reset_position_ids": True}, {"data.reset_position_ids": False}),
        (1, {**BERT, "data.reset_attention_mask": True}, {"data.reset_attention_mask": False}),
        (1, {**BERT, "data.eod_mask_loss": True}, {"data.eod_mask_loss": False}),
        (
            1,
            {**BERT, "data.drop_last_partial_validation_sequence": False},
            {"data.drop_last_partial_validation_sequence": True},
        ),
        (1, {**BERT, "logging.sample_interval": 5}, {"logging.sample_interval": None}),
    ],
    "pairs_have_two_token_types": [
        (1, {**BERT, "model.num_token_types": 1}, {"model.num_token_types": 2}),
        (1, {**BERT, "model.num_token_types": 0}, {"model.bert_binary_head": False}),
    ],
    "masks_need_a_tokenizer": [
        (1, {**BERT, **FILES}, {"data.tokenizer_type": "BertWordPieceLowerCase", "data.vocab_file": "vocab.txt"}),
        (1, {**BERT, **FILES}, {"data.mock_data": True}),
    ],
    "masks_have_room": [
        (1, {**BERT, "data.seq_length": 9}, {"data.seq_length": 10}),
        (1, {**BERT, "data.seq_length": 64, "data.mask_prob": 0.01}, {"data.seq_length": 103}),
    ],
    "one_source_of_data": [
        (1, {"data.mock_data": False}, {"data.mock_data": True}),
        (1, {"data.data_path": ["corpus"]}, {"data.mock_data": False}),
        (1, {**OWN, "data.data_path": ["corpus"]}, {"data.data_path": []}),
    ],
    "loader_is_our_own": [(1, {"data.dataloader_type": "external"}, {"data.dataloader_type": "cyclic"})],
    "data_weights_are_numbers": [
        (1, {**FILES, "data.data_path": words}, {"data.data_path": ["0.3", "first_prefix", "0.7", "second_prefix"]})
        for words in (["0.3", "a", "0.7"], ["a", "0.3"], ["0.3", "a", "-1", "b"], ["nan", "a"], ["0", "a"])
    ],
    "split_is_three_shares": [
        (1, {**FILES, "data.split": split}, {"data.split": "969,30,1"})
        for split in ("", "a,b,c", "1,2,3,4", "0,1,1", "-1,1", "90+10")
    ],
    "training_has_data": [(1, {**OWN, "data.train_data_path": []}, {"data.train_data_path": ["prefix"]})],
    "full_validation_has_no_weights": [
        (
            1,
            {**FILES, "data.data_path": ["1", "a"], "data.full_validation": True, "training.eval_interval": 5},
            {"data.multiple_validation_sets": True},
        ),
        (
            1,
            {
                **OWN,
                "data.valid_data_path": ["1", "a", "2", "b"],
                "data.full_validation": True,
                "training.eval_interval": 5,
            },
            {"data.multiple_validation_sets": True},
        ),
    ],
    "evaluation_has_data": [
        (1, {**OWN, "training.eval_interval": 5, "data.valid_data_path": []}, {"data.valid_data_path": ["prefix"]}),
        (1, {**FILES, "training.eval_interval": 5, "data.split": "100,0,0"}, {"data.split": "969,30,1"}),
        (1, {**FILES, "training.eval_interval": 5, "data.split": "100"}, {"data.split": "969,30,1"}),
    ],
    "tokenizer_has_a_model": [
        (1, {"data.tokenizer_type": "HuggingFaceTokenizer"}, {"data.tokenizer_model": "tokenizer.json"}),
        (1, {"data.tokenizer_type": "Llama2Tokenizer"}, {"data.tokenizer_model": "tokenizer.model"}),
        (1, {"data.tokenizer_type": "BertWordPieceCase"}, {"data.vocab_file": "vocab.txt"}),
        (
            1,
            {"data.tokenizer_type": "GPT2BPETokenizer", "data.vocab_file": "vocab.json"},
            {"data.vocab_file": "vocab.json", "data.merge_file": "merges.txt"},
        ),
    ],
    "plan_flags_belong_to_a_dry_run": [
        (1, {"plan.world_size": 8}, {"plan.dry_run": True}),
        (1, {"plan.gpu_type": "H200", "plan.json": True}, {"plan.gpu_type": None, "plan.json": False}),
    ],
    "plan_knows_the_vocabulary": [
        (
            1,
            {"plan.dry_run": True, "model.vocab_size": None, "data.tokenizer_type": "HuggingFaceTokenizer"},
            {"model.vocab_size": 32000},
        ),
    ],
    "null_tokenizer_has_a_vocabulary": [(1, {"model.vocab_size": None}, {"model.vocab_size": 32000})],
}
FLAT_CASES = [(name, *case) for name, cases in CASES.items() for case in cases]
BY_PATH = {entry.path: entry for entry in all_fields()}


def configuration(*changes: dict) -> Config:
    values = dict(SOUND)
    for change in changes:
        values.update(change)
    return build(values)


def words_of(path: str, value: object) -> list[str]:
    """How a proposal of this value may be written on the command line."""
    entry = BY_PATH[path]
    if value in (None, []) or (type(value) is int and value == 0):
        return [f"leave out {entry.flag}"]
    if isinstance(value, bool):
        return [entry.flag if value else entry.off_flag or f"leave out {entry.flag}"]
    return [entry.flag, " ".join(value) if isinstance(value, list) else str(value)]


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {rule.name for rule in VALUE_RULES + RULES}
    assert all(CASES.values())


def test_every_rule_of_the_files_is_asked() -> None:
    modules = (
        rules_values,
        rules_model,
        rules_parallel,
        rules_stages,
        rules_batches,
        rules_bert,
        rules_rates,
        rules_run,
        rules_logging,
        rules_data,
        rules_plan,
    )
    written = [value for module in modules for value in vars(module).values() if isinstance(value, Rule)]
    assert len(written) == len(VALUE_RULES + RULES)
    assert set(written) == set(VALUE_RULES + RULES)


def test_the_sound_configuration_is_sound_before_and_after_resolving() -> None:
    assert validate(configuration(), 8) == []
    assert validate(resolve(configuration(), 8), 8) == []
    assert validate(configuration(FILES), 8) == []


@pytest.mark.parametrize(("name", "world_size", "broken", "proposal"), FLAT_CASES)
def test_rule_fires_and_its_way_out_works(name: str, world_size: int, broken: dict, proposal: dict) -> None:
    found = [problem for rule, problem in found_by_rule(configuration(broken), world_size) if rule.name == name]
    assert len(found) == 1
    problem = found[0]
    assert problem.flags
    assert all(flag in str(problem) for flag in problem.flags)
    # It names one that was touched, or that the rest of the sentence speaks of.
    spoken_of = f"{problem.wrong} {problem.arithmetic} {problem.way_out}"
    touched = {flag for path in broken | proposal for flag in (BY_PATH[path].flag, BY_PATH[path].off_flag)}
    assert any(flag in touched or flag in spoken_of for flag in problem.flags)
    for path, value in proposal.items():
        for word in words_of(path, value):
            assert word in problem.way_out
    fixed = {path: float(value) if path == "optimizer.lr" else value for path, value in proposal.items()}
    still = [problem for rule, problem in found_by_rule(configuration(broken, fixed), world_size) if rule.name == name]
    assert still == []


@pytest.mark.parametrize("path", [path for path in BY_PATH if BY_PATH[path].kind in (int, float)])
def test_every_number_has_a_range_that_refuses_minus_one(path: str) -> None:
    assert path in RANGES
    assert BY_PATH[path].default is None or path in REQUIRED or BY_PATH[path].default in RANGES[path]
    kind = BY_PATH[path].kind
    found = [
        problem
        for rule, problem in found_by_rule(configuration({path: kind(-1)}), 1)
        if rule is rules_values.number_is_in_range
    ]
    assert [problem.flags for problem in found] == [(BY_PATH[path].flag,)]
    # The proposed value stands at the end of the sentence and is in the range.
    assert float(found[0].way_out.split()[-1]) in RANGES[path]


def test_every_flag_in_a_message_exists() -> None:
    known = {flag for entry in all_fields() for flag in (entry.flag, entry.off_flag) if flag}
    for _, world_size, broken, _ in FLAT_CASES:
        for problem in validate(configuration(broken), world_size):
            words = str(problem).replace(",", " ").replace(";", " ").replace(":", " ").replace("'s", " ").split()
            assert {word for word in words if word.startswith("--")} <= known


def test_all_problems_come_at_once_and_missing_values_cause_no_others() -> None:
    problems = validate(Config(), 8)
    flags = [flag for problem in problems for flag in problem.flags]
    assert [BY_PATH[path].flag for path in REQUIRED] == [
        flag for flag in flags if flag not in ("--data-path", "--mock-data")
    ]
    assert "--data-path" in flags


def test_check_raises_a_numbered_list() -> None:
    check(configuration(), 1)
    broken = configuration({"model.num_attention_heads": 7, "training.bf16": True, "training.fp64": True})
    with pytest.raises(ValueError, match=r"(?s)2 problems.*1\. --hidden-size.*48 % 7 = 6.*2\. --bf16"):
        check(broken, 1)


def test_one_is_told_in_the_singular() -> None:
    (problem,) = validate(configuration({"parallel.tensor_model_parallel_size": 2}), 1)
    assert "1 process does not make whole copies of a model that takes 2 (1 % (2 x 1) = 1)" in str(problem)
    (problem,) = validate(configuration({"training.micro_batch_size": 5, "training.global_batch_size": 8}), 1)
    assert "micro-batches of 5 on each of 1 data parallel rank (" in str(problem)


def test_a_number_that_is_none_is_told_so() -> None:
    (problem,) = validate(configuration({"optimizer.lr": math.inf}), 1)
    assert "inf is out of range; it must be a finite number, above 0, such as" in str(problem)


def test_uneven_layers_and_fewer_groups_than_tensor_ranks_are_accepted() -> None:
    assert validate(configuration({"model.num_layers": 5, PIPELINE: 2, VIRTUAL: 2}), 4) == []
    grouped = {"model.group_query_attention": True, "model.num_query_groups": 2, TENSOR: 4}
    assert validate(configuration(grouped), 4) == []
    assert validate(configuration({"model.num_query_groups": 12}), 1) == []


def test_evaluation_needs_no_test_data_and_synthetic_data_no_split() -> None:
    wanted = {"training.eval_interval": 5}
    assert validate(configuration(FILES, wanted, {"data.split": "99,1,0"}), 1) == []
    assert validate(configuration(wanted, {"data.split": "100"}), 1) == []


def test_validation_never_raises_on_arbitrary_broken_values() -> None:
    for path in BY_PATH:
        kind = BY_PATH[path].kind
        for value in {
            int: (0, -7),
            float: (0.0, -1.0, math.nan),
            str: ("", "x"),
            bool: (True, False),
            list: ([], ["1"]),
        }[kind]:
            config = configuration({path: value})
            assert BY_PATH[path].of(config) is value
            validate(config, 6)


def test_neighbours() -> None:
    assert multiples_near(7, 4) == "4 or 8"
    assert multiples_near(3, 4) == "4"
    assert divisors_near(12, 5) == "4 or 6"
    assert divisors_near(12, 13) == "12"
