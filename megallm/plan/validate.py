"""Validation of a whole configuration: every error at once, before anything starts. Needs no torch."""

from __future__ import annotations

from megallm.config.report import counted, numbered
from megallm.config.tree import Config
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
from megallm.plan.problem import Problem, Rule

VALUE_RULES = (
    rules_values.required_value_is_given,
    rules_values.number_is_in_range,
    rules_values.text_is_a_choice,
)
"""Rules about single values; a value that breaks one is left alone by the rules below."""

RULES = (
    rules_model.heads_divide_hidden_size,
    rules_model.query_groups_are_asked_for,
    rules_model.query_groups_are_numbered,
    rules_model.query_groups_divide_heads,
    rules_model.tensor_size_divides_heads,
    rules_model.tensor_size_divides_query_groups,
    rules_model.default_ffn_is_not_empty,
    rules_model.tensor_size_divides_ffn,
    rules_model.positions_reach_sequence_length,
    rules_model.rotary_width_is_even,
    rules_model.rotary_settings_act,
    rules_model.rope_scaling_fades,
    rules_model.window_is_two_numbers,
    rules_model.one_kind_of_residual,
    rules_model.sinusoidal_width_is_even,
    rules_bert.settings_of_bert_act,
    rules_bert.settings_of_decoders_act,
    rules_bert.pairs_have_two_token_types,
    rules_bert.masks_need_a_tokenizer,
    rules_bert.masks_have_room,
    rules_parallel.layout_divides_world,
    rules_batches.ramp_up_leads_to_the_global_batch,
    rules_batches.stairs_of_batches_are_whole,
    rules_batches.one_way_to_change_the_batch,
    rules_batches.global_batch_divides,
    rules_batches.changing_batches_divide,
    rules_stages.virtual_stages_need_pipeline,
    rules_stages.layers_fill_stages,
    rules_stages.schedule_fits_virtual_stages,
    rules_stages.micro_batch_groups_fill_the_pipeline,
    rules_stages.one_way_to_split_the_layers,
    rules_stages.layout_of_stages_holds_the_model,
    rules_stages.given_layers_leave_enough,
    rules_parallel.tensor_size_divides_sequence,
    rules_parallel.param_gather_overlap_needs_distributed_optimizer,
    rules_parallel.backend_runs_on_device,
    rules_run.one_precision,
    rules_run.operators_are_known,
    rules_run.recompute_settings_act,
    rules_run.recomputed_modules_are_known,
    rules_run.loss_scale_starts_above_its_minimum,
    rules_rates.minimum_is_below_peak,
    rules_rates.warmup_starts_below_peak,
    rules_rates.warmup_ends_before_decay,
    rules_rates.warmup_samples_end_before_decay,
    rules_rates.one_unit_of_the_schedule,
    rules_rates.stable_learning_rate_decays_at_the_end,
    rules_rates.decoupled_rate_decays_downwards,
    rules_rates.weight_decay_has_both_ends,
    rules_run.one_length_of_the_run,
    rules_run.evaluation_has_batches,
    rules_run.without_training_there_is_evaluation,
    rules_run.saving_has_a_folder,
    rules_run.exporting_has_a_folder,
    rules_run.one_origin_of_weights,
    rules_run.loading_has_a_folder,
    rules_run.retained_checkpoints_are_saved,
    rules_run.timeline_step_is_in_the_run,
    rules_logging.weights_and_biases_is_named,
    rules_logging.samples_are_texts,
    rules_logging.progress_file_has_a_folder,
    rules_logging.timers_have_a_level,
    rules_logging.profiled_steps_are_in_the_run,
    rules_logging.profiled_ranks_exist,
    rules_data.one_source_of_data,
    rules_run.loader_is_our_own,
    rules_data.data_weights_are_numbers,
    rules_data.split_is_three_shares,
    rules_data.training_has_data,
    rules_data.evaluation_has_data,
    rules_data.full_validation_has_no_weights,
    rules_run.tokenizer_has_a_model,
    rules_run.null_tokenizer_has_a_vocabulary,
    rules_plan.plan_flags_belong_to_a_dry_run,
    rules_plan.plan_knows_the_vocabulary,
)
"""Rules about values that must fit together."""


def validate(config: Config, world_size: int) -> list[Problem]:
    """Every error of `config`, resolved or not, for `world_size` processes. Files are not looked at. Never raises."""
    return [problem for _, problem in found_by_rule(config, world_size)]


def check(config: Config, world_size: int) -> None:
    """Raise ValueError with a numbered list of every error of `config` for `world_size` processes, if there is one."""
    problems = validate(config, world_size)
    if problems:
        count = counted(len(problems), "problem")
        raise ValueError(f"{count} in the configuration:\n{numbered(list(map(str, problems)))}")


def found_by_rule(config: Config, world_size: int) -> list[tuple[Rule, Problem]]:
    """Every error with the rule that found it."""
    assert world_size >= 1, f"a job has at least one process, not {world_size}"
    found = [(rule, problem) for rule in VALUE_RULES for problem in rule.find(config, world_size)]
    broken = rules_values.broken_paths([problem for _, problem in found])
    for rule in RULES:
        if broken.isdisjoint(rule.needs):
            found += [(rule, problem) for problem in rule.find(config, world_size)]
    return found
