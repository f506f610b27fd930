"""The plan that --dry-run prints: its parts against counts by hand, its whole without torch, for any number of GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megallm.config import Config, difference_yaml, from_dict, resolve
from megallm.config.dictionary import build
from megallm.config.tree import DataConfig
from megallm.plan import alternatives
from megallm.plan import plan as plan_module
from megallm.plan.alternatives import changes_that_fit, next_best
from megallm.plan.dry_run import dry_run
from megallm.plan.flops import parameter_count
from megallm.plan.gpus import GPUS, SAFE_SHARE
from megallm.plan.memory import KINDS, memory_of_rank, peak_of_step, state_bytes
from megallm.plan.plan import Plan, make_plan
from megallm.plan.report import plan_text
from megallm.plan.schedule import schedule_of
from megallm.plan.stages import Layout
from megallm.plan.timing import end_of_step, shortest_step, stage_costs, step_time
from megallm.plan.validate import validate
from megallm.plan.vocabulary import size_of_tokenizer
from megallm.schedule import Kind, LoweredSchedule, lower

LLAMA_7B: dict[str, Any] = {
    "model.num_layers": 32,
    "model.hidden_size": 4096,
    "model.ffn_hidden_size": 11008,
    "model.num_attention_heads": 32,
    "model.position_embedding_type": "rope",
    "model.normalization": "RMSNorm",
    "model.activation": "swiglu",
    "model.add_bias_linear": False,
    "model.tie_embeddings": False,
    "model.vocab_size": 32000,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 128,
    "training.train_iters": 10,
    "training.bf16": True,
    "optimizer.lr": 1e-4,
    "data.seq_length": 4096,
    "data.mock_data": True,
    "data.tokenizer_type": "NullTokenizer",
    "parallel.use_distributed_optimizer": True,
}
PIPELINE, TENSOR = "parallel.pipeline_model_parallel_size", "parallel.tensor_model_parallel_size"
VIRTUAL = "parallel.num_virtual_stages_per_pipeline_rank"


def laid_out(world_size: int, **changes: Any) -> Layout:
    values = LLAMA_7B | {name.replace("__", "."): value for name, value in changes.items()}
    return Layout(resolve(build(values), world_size), world_size)


def configuration(changes: dict[str, Any]) -> Config:
    return build(LLAMA_7B | changes)


def test_stages_hold_every_parameter_once() -> None:
    for sizes in ({}, {PIPELINE: 4}, {PIPELINE: 4, VIRTUAL: 2}, {PIPELINE: 2, TENSOR: 4}):
        layout = Layout(resolve(configuration(sizes), 64), 64)
        whole = parameter_count(layout.config.model).total
        held = sum(stage.parameters.total for stage in layout.stages)
        whole_on_each = sum(2 * len(stage.layers) + stage.is_last for stage in layout.stages) * 4096  # norms
        assert held == (whole - whole_on_each) // layout.tensor + whole_on_each


def test_the_state_of_a_process_is_what_the_optimizer_keeps() -> None:
    parameters = 6_738_415_616
    alone = state_bytes(laid_out(1), 0)
    assert alone == {
        "weights": 2 * parameters,
        "gradients": 4 * parameters,
        "master weights": 4 * parameters,
        "moments": 8 * parameters,
    }
    assert sum(alone.values()) == 18 * parameters
    assert sum(state_bytes(laid_out(8), 0).values()) == pytest.approx((6 + 12 / 8) * parameters)
    assert sum(state_bytes(laid_out(8, parallel__use_distributed_optimizer=False), 0).values()) == 18 * parameters
    assert sum(state_bytes(laid_out(4, training__bf16=False), 0).values()) == pytest.approx((8 + 8 / 4) * parameters)


@pytest.mark.parametrize("sharded", [True, False])
def test_an_optimizer_with_one_moment_moves_just_that_moment_less(sharded: bool) -> None:
    both = [
        laid_out(8, parallel__use_distributed_optimizer=sharded, optimizer__optimizer=name) for name in ("adam", "sgd")
    ]
    gpu = GPUS["H100"]
    seconds = [end_of_step(layout, gpu, 0, [1.0], [1.0])[2] for layout in both]
    moment = state_bytes(both[1], 0)["moments"]
    assert 2 * moment == state_bytes(both[0], 0)["moments"]
    # It is neither read nor written.
    assert seconds[0] - seconds[1] == pytest.approx(2 * moment / (gpu.bandwidth * gpu.efficiencies.bandwidth))


FILES = {
    "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7}]},
    "unigram/tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", 0.0]]}},
    "vocab.json": {"a": 0, "b": 4},
    "folder/vocab.txt": "a\nb\nc\n",
}


def test_files_of_a_tokenizer_tell_the_vocabularys_size(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def size(**settings: Any) -> int | None:
        return size_of_tokenizer(DataConfig(**settings))

    assert size(tokenizer_model=str(tmp_path / "tokenizer.json")) == 8
    assert size(tokenizer_model=str(tmp_path / "unigram")) == 2
    assert size(vocab_file=str(tmp_path / "vocab.json")) == 5
    assert size(tokenizer_model=str(tmp_path / "folder")) == 3
    # As BERT's tokenizers read it, with [BOS] and [EOS] after it.
    assert size(vocab_file=str(tmp_path / "folder" / "vocab.txt")) == 5
    for unknown in (
        {},
        {"tokenizer_model": str(tmp_path / "missing.json")},
        {"tokenizer_model": str(tmp_path / "vocab.json")},
        {"tokenizer_model": str(tmp_path / "folder"), "vocab_extra_ids": 2},
    ):
        assert size(**unknown) is None
    config = configuration({"plan.dry_run": True, "plan.json": True, "model.vocab_size": None})
    data = replace(config.data, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json"))
    told = json.loads(dry_run(replace(config, data=data), 1))
    known = json.loads(dry_run(replace(config, model=replace(config.model, vocab_size=8)), 1))
    assert told["parameters"] == known["parameters"] and not told["notes"]


@pytest.mark.parametrize("changes", [{}, {VIRTUAL: 2}, {"parallel.pipeline_schedule": "gpipe"}])
def test_activations_are_those_of_the_schedules_peak(changes: dict[str, Any]) -> None:
    config = resolve(configuration({PIPELINE: 4, "training.global_batch_size": 12} | changes), 4)
    layout = Layout(config, 4)
    for rank in range(4):
        actions = schedule_of(config.parallel, 12).actions[rank]
        stages = {stage.number: stage for stage in layout.on_rank(rank)}
        at_most = 0
        for end in range(len(actions)):
            begun = {(a.stage, a.micro_batch) for a in actions[: end + 1] if a.kind is Kind.F}
            done = {(a.stage, a.micro_batch) for a in actions[:end] if a.kind is Kind.B}
            kept = sum(layout.kept(stages[s]) + layout.kept_logits(stages[s]) for s, _ in begun - done)
            at_most = max(at_most, kept)
        peak = peak_of_step(layout, rank, actions)
        # Where a backward pass needs more of its own, the peak may be there, not where most is kept.
        assert at_most - peak["working memory"] <= peak["activations"] + peak["logits"] <= at_most


def test_the_first_rank_of_1f1b_holds_as_many_micro_batches_as_ranks() -> None:
    layout = laid_out(4, parallel__pipeline_model_parallel_size=4)
    one = peak_of_step(layout, 0, schedule_of(layout.config.parallel, 1).actions[0])["activations"]
    for number, times in ((2, 2), (4, 4), (8, 4), (32, 4)):
        assert peak_of_step(layout, 0, schedule_of(layout.config.parallel, number).actions[0])["activations"] == (
            times * one
        )


def test_full_recompute_keeps_the_input_of_each_layer() -> None:
    layout = laid_out(1, training__recompute_granularity="full")
    hidden = 4096 * 4096 * 2
    (stage,) = layout.stages
    # The inputs of 32 layers, of the final norm and of the output layer; statistics of a norm, what the loss keeps.
    assert layout.kept(stage) == 34 * hidden + 4096 * 4 + 4096 * 8
    assert layout.kept_logits(stage) == 4096 * 32000 * 2


def test_a_loss_in_chunks_keeps_no_logits_and_takes_a_third_of_the_output_layer_more() -> None:
    whole, chunked = laid_out(1), laid_out(1, training__loss_chunk_size=1024)
    (stage,) = whole.stages
    assert (whole.kept(stage), chunked.kept_logits(stage)) == (chunked.kept(stage), 0)
    assert chunked.sizes.chunk_of_logits == 1024 * 32000 * 2
    schedule = schedule_of(whole.config.parallel, 1)
    before, after = (stage_costs(layout, GPUS["H100"]).per_stage(schedule) for layout in (whole, chunked))
    assert after[0] == before[0]
    rate = GPUS["H100"].flops * GPUS["H100"].efficiencies.product
    assert after[1][0] - before[1][0] == pytest.approx(2 * 4096 * 32000 * 4096 / rate)


def test_a_loss_in_chunks_is_named_where_it_makes_a_plan_fit() -> None:
    layout = laid_out(
        8,
        model__vocab_size=256_000,
        parallel__use_distributed_optimizer=True,
        training__micro_batch_size=4,
        training__recompute_granularity="full",
    )
    plan = make_plan(layout, GPUS["H100"])
    logits = plan.memory[0]["logits"]
    assert logits == 4 * 4096 * 256_000 * 2
    changes = changes_that_fit(plan, memory=int((plan.peak - logits // 2) / SAFE_SHARE))
    assert ("--loss-chunk-size 1024",) in [change.flags for change in changes]


@pytest.mark.parametrize("virtual", [1, 2])
def test_the_bubble_of_even_stages_is_the_formulas(virtual: int) -> None:
    even = {PIPELINE: 4, VIRTUAL: virtual, "training.global_batch_size": 16, "model.vocab_size": 1}
    layout = Layout(resolve(configuration(even), 4), 4)
    fast = replace(GPUS["H100"], link=1e30, network=1e30)
    plan = make_plan(layout, fast)
    assert plan.step.bubble == pytest.approx(3 / (16 * virtual + 3), abs=1e-4)
    assert plan.ideal_bubble == pytest.approx(3 / (16 * virtual + 3))


def test_a_long_step_is_as_long_as_if_every_micro_batch_were_timed() -> None:
    layout = laid_out(8, parallel__pipeline_model_parallel_size=8, training__global_batch_size=128)
    whole, part = make_plan(layout, GPUS["H100"]), make_plan(layout, GPUS["H100"], most_timed=200)
    assert len(part.step.timeline.events) < len(whole.step.timeline.events) / 3
    assert part.step.pipeline == pytest.approx(whole.step.pipeline, rel=0.01)
    assert part.memory == whole.memory


def test_of_gpipe_fewer_micro_batches_tell_what_all_of_them_take_and_keep() -> None:
    layout = laid_out(
        4,
        parallel__pipeline_model_parallel_size=4,
        parallel__pipeline_schedule="gpipe",
        training__global_batch_size=40,
    )
    whole, part = (lower(schedule_of(layout.config.parallel, number)) for number in (40, 8))
    times = [step_time(layout, GPUS["H100"], lowered).pipeline for lowered in (whole, part)]
    assert times[1] == pytest.approx(times[0], rel=1e-12)
    for rank in range(4):
        assert memory_of_rank(layout, rank, part) == memory_of_rank(layout, rank, whole)
    assert make_plan(layout, GPUS["H100"]).memory == [memory_of_rank(layout, rank, whole) for rank in range(4)]


@pytest.mark.parametrize(("virtual", "number"), [(1, 3), (2, 8)])
def test_too_few_micro_batches_to_fill_the_pipeline_tell_what_a_filled_one_takes_and_keeps(
    virtual: int, number: int
) -> None:
    layout = deep(virtual, 64)
    whole, part = (lower(schedule_of(layout.config.parallel, many)) for many in (64, number))
    times = [step_time(layout, GPUS["H100"], lowered).pipeline for lowered in (whole, part)]
    assert times[1] == pytest.approx(times[0], rel=0.005)
    assert_memory_is_that_of(layout, whole, part, buffers=1)


# Virtual stages, micro-batches and size of a group: as many micro-batches left over as there can be, a large group,
# stages of one layer of which some are empty, and both a large group and what is left over.
@pytest.mark.parametrize(
    ("virtual", "number", "group"),
    [(1, 68, None), (2, 68, None), (4, 71, None), (4, 128, 32), (5, 79, None), (2, 109, 13)],
)
def test_a_part_of_the_schedule_keeps_what_the_whole_does(
    virtual: int, number: int, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = deep(virtual, number, group)
    whole = lower(schedule_of(layout.config.parallel, number))
    usual = plan_module._timed(layout, 1)
    assert usual.schedule.num_micro_batches < number
    assert_memory_is_that_of(layout, whole, usual, buffers=2 if number % (group or 8) else 0)
    monkeypatch.setattr(plan_module, "_TOO_MANY", 40)
    shortest = plan_module._timed(layout, 1)
    assert shortest.schedule.num_micro_batches < usual.schedule.num_micro_batches
    assert_memory_is_that_of(layout, whole, shortest, buffers=2)
    seconds = step_time(layout, GPUS["H100"], whole).total
    assert step_time(layout, GPUS["H100"], usual).total == pytest.approx(seconds, rel=0.01)
    assert step_time(layout, GPUS["H100"], shortest).total == pytest.approx(seconds, rel=0.02)


def deep(virtual: int, number: int, group: int | None = None) -> Layout:
    """Eight ranks with `number` micro-batches."""
    return laid_out(
        8,
        parallel__pipeline_model_parallel_size=8,
        parallel__num_virtual_stages_per_pipeline_rank=virtual,
        parallel__microbatch_group_size_per_virtual_pipeline_stage=group,
        training__global_batch_size=number,
    )


def assert_memory_is_that_of(layout: Layout, whole: LoweredSchedule, part: LoweredSchedule, *, buffers: int) -> None:
    """What `part` tells of every rank is what all micro-batches tell, but for a number of buffers more or less."""
    for rank in range(layout.pipeline):
        kinds, few = memory_of_rank(layout, rank, whole), memory_of_rank(layout, rank, part)
        assert abs(kinds.pop("buffers") - few.pop("buffers")) <= buffers * layout.sizes.hidden, rank
        assert few == kinds, rank


def test_the_estimate_of_a_layout_knows_its_groups() -> None:
    layout = deep(4, 128, 32)
    whole = lower(schedule_of(layout.config.parallel, 128))
    kinds = memory_of_rank(layout, 0, whole)
    _, estimated = alternatives._estimate(layout, GPUS["H100"])
    assert estimated == pytest.approx(sum(kinds.values()) - kinds["communicators"], rel=0.02)


def test_of_gpipe_two_micro_batches_are_timed_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = laid_out(
        8,
        parallel__pipeline_model_parallel_size=8,
        parallel__pipeline_schedule="gpipe",
        training__global_batch_size=16,
    )
    whole = make_plan(layout, GPUS["H100"])
    monkeypatch.setattr(plan_module, "_TOO_MANY", 8)
    assert make_plan(layout, GPUS["H100"], most_timed=1).step.total == pytest.approx(whole.step.total, rel=0.01)


def test_a_step_is_never_shorter_than_the_shortest() -> None:
    """The search times nothing whose shortest step is longer than what it has found."""
    for pipeline, virtual, schedule in (
        (1, 1, "auto"),
        (4, 1, "auto"),
        (4, 1, "gpipe"),
        (8, 4, "auto"),
        (2, 3, "auto"),
    ):
        layout = laid_out(
            8,
            parallel__pipeline_model_parallel_size=pipeline,
            parallel__num_virtual_stages_per_pipeline_rank=virtual,
            parallel__pipeline_schedule=schedule,
        )
        plan = make_plan(layout, GPUS["H100"])
        shortest = shortest_step(layout, GPUS["H100"])
        assert 0.9 * plan.step.total < shortest <= plan.step.total * (1 + 1e-12)


@pytest.mark.slow
def test_the_search_names_the_same_layouts_as_if_it_had_timed_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes in ({}, {"training__micro_batch_size": 2, "training__global_batch_size": 512}):
        plan = make_plan(laid_out(64, **sizes), GPUS["H100"])
        named = [other.to_dict() for other in next_best(plan, 3)]
        with monkeypatch.context() as patched:
            patched.setattr(alternatives, "shortest_step", lambda layout, gpu: 0.0)
            assert [other.to_dict() for other in next_best(plan, 3)] == named


def test_a_step_takes_what_the_operations_take_and_not_much_more() -> None:
    plan = make_plan(laid_out(1), GPUS["H200"])
    assert plan.flops.half * plan.tokens == pytest.approx(42.86e9 * 128 * 4096, rel=1e-3)
    assert 0.45 < plan.flops_of_a_gpu / GPUS["H200"].flops < 0.70
    assert plan.step.bubble == pytest.approx(0.0, abs=1e-9)


@pytest.mark.slow
def test_changes_that_fit_do_and_other_layouts_are_valid() -> None:
    layout = laid_out(8)
    small = replace(GPUS["A100-40"], name="small")
    plan = make_plan(layout, small)
    assert not plan.fits
    changes = changes_that_fit(plan)
    assert len(changes) == 3
    assert all(change.plan.peak <= SAFE_SHARE * small.memory for change in changes)
    assert all(validate(change.plan.layout.config, 8) == [] for change in changes)
    others = next_best(plan, 3)
    assert [other.step.total for other in others] == sorted(other.step.total for other in others)
    assert all(other.fits and validate(other.layout.config, 8) == [] for other in others)
    assert changes_that_fit(plan, memory=2**30) == []


@pytest.mark.slow
def test_of_many_ranks_some_are_drawn() -> None:
    def picture(ranks: int) -> str:
        layout = Layout(resolve(configuration({PIPELINE: ranks, "model.num_layers": 64}), ranks), ranks)
        return plan_text(make_plan(layout, GPUS["H100"]), [], []).split("schedule ")[1].split("\n\n")[0]

    lines = picture(16).splitlines()
    assert [int(line.split()[1]) for line in lines[1:-1]] == [0, 2, 4, 6, 8, 10, 12, 15]
    assert lines[-1].strip().startswith("8 of 16 ranks and 32 of 128 micro-batches drawn; ")
    assert picture(64).endswith("more than 32 ranks are not drawn")


@pytest.mark.slow
def test_the_search_of_many_stages_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def counted(*arguments: Any) -> Plan:
        plan = make_plan(*arguments)
        timed.append(len(plan.step.timeline.events))
        return plan

    monkeypatch.setattr(alternatives, "make_plan", counted)
    huge = {"model.num_layers": 160, "model.hidden_size": 16384, "model.ffn_hidden_size": 65536}
    sizes = {PIPELINE: 16, VIRTUAL: 5, TENSOR: 8, "training.global_batch_size": 8192}
    plan = make_plan(Layout(resolve(configuration(huge | sizes), 16384), 16384), GPUS["H100"])
    assert next_best(plan, 3)
    assert len(changes_that_fit(plan)) == 3
    # About 100,000 are a second of one core.
    assert sum(timed) < 200_000


@pytest.mark.slow
def test_the_text_fits_a_screen_and_says_what_it_assumes() -> None:
    config = configuration({"plan.dry_run": True, PIPELINE: 4, VIRTUAL: 2, TENSOR: 2})
    text = dry_run(config, 16)
    lines = text.splitlines()
    assert len(lines) <= 52
    assert max(map(len, lines)) <= 112
    assert "6.74 B parameters on 16 x H100: fits" in lines[0]
    for word in ("interleaved: bubble", "rank 3", "master weights", "tokens/s", "next best", "not from a measurement"):
        assert word in text
    known = replace(config, model=replace(config.model, vocab_size=None))
    assumed = dry_run(replace(known, data=replace(config.data, tokenizer_type="GPT2BPETokenizer")), 16)
    assert "50,257; --vocab-size says another" in assumed
    tight = dry_run(replace(config, plan=replace(config.plan, gpu_type="RTX-4090")), 16)
    assert "does not fit" in tight
    assert "to fit" in tight


def test_json_holds_the_same_in_bytes_and_seconds() -> None:
    plan = json.loads(dry_run(configuration({"plan.dry_run": True, "plan.json": True, PIPELINE: 2}), 8))
    assert plan["parameters"] == 6_738_415_616
    assert [stage["layers"] for stage in plan["stages"]] == [16, 16]
    assert set(plan["memory_bytes"][0]) == set(KINDS)
    assert plan["memory_peak_bytes"] == max(sum(kinds.values()) for kinds in plan["memory_bytes"])
    assert plan["seconds"]["step"] == pytest.approx(
        sum(plan["seconds"][part] for part in ("pipeline", "gradients", "parameters", "optimizer"))
    )
    assert plan["traffic"]["pipeline"] == {"messages": 32, "bytes": 32 * 4096 * 4096 * 2}
    assert plan["next_best"]


@pytest.mark.slow
def test_a_large_plan_needs_neither_torch_nor_numpy() -> None:
    words = """
        --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --vocab-size 50257 --bf16
        --micro-batch-size 1 --global-batch-size 1536 --train-iters 100 --lr 1e-4 --tokenizer-type NullTokenizer
        --mock-data --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --use-distributed-optimizer
        --num-virtual-stages-per-pipeline-rank 3 --dry-run --world-size 1024
    """
    program = (
        "import sys, pretrain_gpt; pretrain_gpt.main(sys.argv[1:]); "
        "assert not {'torch', 'numpy'} & set(sys.modules), 'a plan is slow to start'"
    )
    done = subprocess.run([sys.executable, "-c", program, *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "175 B parameters on 1,024 x H100" in done.stdout


def test_what_differs_from_the_defaults_is_read_back() -> None:
    import yaml

    config = configuration({PIPELINE: 2})
    text = difference_yaml(config)
    assert from_dict(yaml.safe_load(text)) == config
    assert "adam_beta1" not in text
    assert difference_yaml(Config()) == "{}\n"


def test_it_says_where_it_assumes_operators_that_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build(LLAMA_7B)
    monkeypatch.setattr("megallm.plan.dry_run.find_spec", lambda name: None)
    assert "--ops reference plans for plain torch" in dry_run(config, 8)
    monkeypatch.setattr("megallm.plan.dry_run.find_spec", lambda name: name)
    assert "--ops reference" not in dry_run(config, 8)


def test_plain_torch_keeps_more() -> None:
    native, plain = (laid_out(8, training__ops=ops, model__attention_dropout=0.1) for ops in ([], ["reference"]))
    more = plain.layer_bytes - native.layer_bytes
    # Of each score the probability in 4 bytes, not 2, and the mask of dropout.
    assert more > 3 * 32 * 4096**2
