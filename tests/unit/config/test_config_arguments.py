"""The command line: every flag, files, aliases, Megatron's flags, and all mistakes in one answer."""

# ruff: noqa: SIM905 (command lines stand here as people type them)

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megallm.config import Config, difference, parse_arguments, resolve, to_yaml
from megallm.config.completion import completion_script
from megallm.config.dictionary import build
from megallm.config.fields import all_fields
from megallm.config.megatron import ALIASES, IGNORED, REFUSED, Refused, answer
from megallm.plan.validate import validate

FIELDS = all_fields()


def parse(*words: str) -> Config:
    return parse_arguments(words, prog="pretrain_gpt.py", description="Pretrain a GPT.")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command line is answered with when it is refused."""
    with pytest.raises(SystemExit) as leaving:
        parse(*words)
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def changed(config: Config) -> dict[str, object]:
    return {path: new for path, _, new in difference(Config(), config)}


def other_value(entry):
    """A value of the field's type that is not its default, and its words on the command line."""
    if entry.kind is bool:
        return (not entry.default, [entry.off_flag if entry.default else entry.flag])
    if entry.choices is not None:
        value = next(choice for choice in entry.choices if choice != entry.default)
        return value, [entry.flag, value]
    if entry.kind is list:
        return ["0.3", "first", "0.7", "second"], [entry.flag, "0.3", "first", "0.7", "second"]
    return {
        int: (37, [entry.flag, "37"]),
        float: (2.5e-7, [entry.flag, "2.5e-7"]),
        str: ("word", [entry.flag, "word"]),
    }[entry.kind]


def test_nothing_given_is_the_default_tree() -> None:
    assert parse() == Config()


@pytest.mark.parametrize("entry", FIELDS, ids=lambda entry: entry.path)
def test_each_flag_sets_its_field_and_nothing_else(entry) -> None:
    value, words = other_value(entry)
    assert changed(parse(*words)) == {entry.path: value}


def test_all_flags_together_survive_a_file(tmp_path: Path) -> None:
    words = [word for entry in FIELDS for word in other_value(entry)[1]]
    config = parse(*words)
    assert len(changed(config)) == len(FIELDS)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert parse("--config", str(file)) == config


def test_flag_names_are_unique() -> None:
    flags = [flag for entry in FIELDS for flag in (entry.flag, entry.off_flag) if flag]
    flags += [alias.flag for alias in ALIASES]
    assert len(flags) == len(set(flags))
    assert set(flags).isdisjoint({entry.flag for entry in (*IGNORED, *REFUSED)})


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {num_layers: 4, hidden_size: 64, activation: relu}\noptimizer: {lr: 1e-4}\ntraining:\n")
    config = parse("--num-layers", "8", "--config", str(file), "--swiglu")
    assert changed(config) == {
        "model.num_layers": 8,
        "model.hidden_size": 64,
        "model.activation": "swiglu",
        "optimizer.lr": 1e-4,
    }


def test_mistakes_in_the_file_are_named_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {num_layer: 4, hidden_size: 4.5, activation: gelux, lr: 1, vocab_size: true, tie_embeddings: 1,\n"
        "  swiglu: true, disable-bias-linear: true}\n"
        "modle: {}\ndata: 3\nnum_layers: 4\nuse-checkpoint-opt_param-scheduler: true\n"
        "optimizer: {lr: fast, min_lr: null}\n"
        "training: {eval_interval: null}\nparallel: {tensor-model-parallel-size: 2}\n"
    )
    message = refused(capsys, "--config", str(file), "--lr", "fast")
    for sentence in (
        f"in {file}: model.num_layer is unknown; did you mean num_layers",
        "model.hidden_size takes a whole number, not 4.5",
        "model.activation takes one of gelu, ",
        "model.lr is unknown: lr belongs under optimizer",
        "model.swiglu is unknown: it is a flag, which a file writes as model.activation: swiglu",
        "model.disable-bias-linear is unknown: it is a flag, which a file writes as model.add_bias_linear: false",
        "use-checkpoint-opt_param-scheduler stands at the top and is a flag, which a file writes as "
        "optimizer.use_checkpoint_opt_param_scheduler: true",
        "model.vocab_size takes a whole number, not True",
        "model.tie_embeddings takes true or false, not 1",
        "there is no section modle, only model, ",
        "did you mean model?",
        "data is a mapping of names to values, not 3",
        "num_layers stands at the top, but belongs under model",
        "optimizer.lr takes a number, not 'fast'",
        "optimizer.min_lr takes a number, not an empty value",
        "parallel.tensor-model-parallel-size is unknown; did you mean tensor_model_parallel_size",
        "--lr takes a number, not 'fast'",
    ):
        assert sentence in message
    assert "16 problems" in message
    assert "eval_interval" not in message


@pytest.mark.parametrize("text", ["model: [", "\t- x: {", "just words", "- a\n- b"])
def test_a_file_that_is_no_tree_is_a_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert str(file) in refused(capsys, "--config", str(file))


def test_a_file_that_cannot_be_read_is_told_without_the_machines_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    assert f"--config {file} cannot be read: No such file or directory\n" in refused(capsys, "--config", str(file))
    file.write_bytes(b"model:\n\xdf")
    assert f"--config {file} cannot be read: it is no text in UTF-8, with its byte 0xdf" in refused(
        capsys, "--config", str(file)
    )


def test_what_is_said_twice_in_a_file_or_by_two_files_is_not_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  num_layers: 2\n  num_layers: 3\ndata: {seq_length: 8}\nmodel: {}\n")
    message = refused(capsys, "--config", str(file))
    assert "num_layers stands in line 2 and again in line 3; keep one" in message
    assert "model stands in line 1 and again in line 5; keep one" in message
    message = refused(capsys, "--config", "one.yaml", "--config", str(file))
    assert f"--config is given 2 times (one.yaml, {file}), but a run has one file" in message


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--num-layer 4", "--num-layer is unknown; did you mean --num-layers"),
        ("--num_layers 4", "--num_layers is unknown; did you mean --num-layers"),
        ("-lr 4", "-lr is unknown; did you mean --lr?"),
        ("--xyzzy", "--xyzzy is unknown"),
        ("--num-layers four", "--num-layers takes a whole number, not 'four'"),
        ("--num-layers 1e3", "write 1000"),
        ("--lr", "--lr needs a value"),
        ("--data-path --mock-data", "--data-path needs a value"),
        ("--num-layers 4 5", "--num-layers takes one value, not 2: 4 5"),
        ("--bf16 true", "--bf16 is a switch and takes no value, not true"),
        ("--group-query-attention 8", "write --group-query-attention --num-query-groups 8"),
        ("--activation gelux", "--activation takes one of gelu, "),
        ("pretrain --bf16", "pretrain stands before the first flag"),
        ("--swiglu --squared-relu", "--swiglu and --squared-relu contradict each other: both set model.activation"),
        ("--activation relu --swiglu", "--activation and --swiglu contradict each other"),
        ("--recompute-activations --recompute-granularity full", "contradict each other"),
        ("--sequence-parallel --no-sequence-parallel", "contradict each other"),
    ],
)
def test_each_mistake_is_a_sentence(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(capsys, *words.split())


def test_all_mistakes_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(
        capsys, *"--num-layer 4 --lr fast --fp8-format e4m3 --context-parallel-size 2 --activation x".split()
    )
    assert "5 problems in the configuration" in message
    assert [f"  {number}. --" in message for number in range(1, 7)] == [True] * 5 + [False]


def test_negative_numbers_and_equals_signs_are_values() -> None:
    config = parse("--lr=-1e-3", "--weight-decay", "-1e-3", "--seed", "-5", "--min-lr", "-inf", "--split=969, 30, 1")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.training.seed) == (-1e-3, -1e-3, -5)
    assert config.optimizer.min_lr == -float("inf")


def test_a_flag_given_twice_takes_its_last_value() -> None:
    assert parse("--num-layers", "4", "--num-layers", "8").model.num_layers == 8


@pytest.mark.parametrize("alias", list(ALIASES), ids=lambda alias: alias.flag)
def test_aliases(alias) -> None:
    (entry,) = (entry for entry in all_fields() if entry.path == alias.path)
    assert entry.of(parse(alias.flag)) == alias.value


def test_no_position_embedding_gives_way() -> None:
    both = ["--no-position-embedding", "--use-rotary-position-embeddings"]
    assert parse(*both).model.position_embedding_type == "rope"
    assert parse(*reversed(both)).model.position_embedding_type == "rope"
    assert parse("--no-position-embedding").model.position_embedding_type == "none"


def test_no_position_embedding_gives_way_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {position_embedding_type: rope}")
    config = parse("--config", str(file), "--no-position-embedding")
    assert config.model.position_embedding_type == "rope"


def test_layers_per_virtual_stage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = "--num-layers 24 --pipeline-model-parallel-size 4".split()
    per_stage = "--num-layers-per-virtual-pipeline-stage"
    assert parse(*shape, per_stage, "2").parallel.num_virtual_stages_per_pipeline_rank == 3
    message = refused(capsys, *shape, per_stage, "4")
    assert "24 % (4 x 4) = 8; use 1 or 2 or 3 or 6" in message
    assert "at least 1" in refused(capsys, *shape, per_stage, "0")
    assert "keep one" in refused(capsys, *shape, per_stage, "2", "--num-virtual-stages-per-pipeline-rank", "3")
    assert parse(per_stage, "2").parallel.num_virtual_stages_per_pipeline_rank == 1
    accounted = "--num-layers 22 --pipeline-model-parallel-size 4 --account-for-embedding-in-pipeline-split".split()
    loss = "--account-for-loss-in-pipeline-split"
    assert parse(*accounted, loss, per_stage, "2").parallel.num_virtual_stages_per_pipeline_rank == 3
    assert "22 and the 1 accounted for" in refused(capsys, *accounted, per_stage, "2")
    file = tmp_path / "run.yaml"
    file.write_text("model: {num_layers: 8}\nparallel: {pipeline_model_parallel_size: 2}")
    assert parse("--config", str(file), per_stage, "2").parallel.num_virtual_stages_per_pipeline_rank == 2


def test_a_program_trains_one_architecture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def parse_for(architecture: str, *words: str) -> Config:
        return parse_arguments(words, prog="program", description="", architecture=architecture)

    file = tmp_path / "bert.yaml"
    file.write_text("model: {architecture: bert, num_layers: 2}")
    assert parse_for("bert").model.architecture == "bert"
    assert parse_for("bert", "--config", str(file)) == parse("--config", str(file))
    for words in (["--config", str(file)], ["--architecture", "bert"]):
        with pytest.raises(SystemExit):
            parse_for("gpt", *words, "--lr", "fast")
        message = capsys.readouterr().err
        assert "2 problems" in message
        assert "--architecture bert: pretrain_bert.py trains that, and pretrain_gpt.py gpt" in message
    assert parse_for("bert", "--vocab-file", "vocab.txt").data.tokenizer_type == "BertWordPieceLowerCase"
    assert parse_for("gpt", "--vocab-file", "vocab.txt").data.tokenizer_type is None


def test_what_scripts_leave_unsaid(capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--vocab-file", "vocab.json", "--merge-file", "merges.txt")
    assert parse(*files).data.tokenizer_type == "GPT2BPETokenizer"
    assert parse(*files[:2]).data.tokenizer_type is None
    assert parse(*files, "--tokenizer-type", "NullTokenizer").data.tokenizer_type == "NullTokenizer"
    assert parse("--eval-interval", "5", "--eval-iters", "0").training.eval_interval is None
    assert "--eval-iters 0 switches evaluations off" in capsys.readouterr().err
    assert parse("--eval-interval", "5", "--eval-iters", "1").training.eval_interval == 5
    assert parse("--eval-interval", "5", "--eval-iters", "0", "--full-validation").training.eval_interval == 5


def test_a_layout_of_the_stages_makes_virtual_stages() -> None:
    def virtual_stages(*words: str) -> int:
        size = ("--pipeline-model-parallel-size", "2")
        return parse(*size, "--pipeline-model-parallel-layout", *words).parallel.num_virtual_stages_per_pipeline_rank

    assert virtual_stages("Et|t|t|tL") == 2
    assert virtual_stages("Et|tL") == 1
    assert virtual_stages("Et|t|tL") == virtual_stages("nonsense") == 1
    assert virtual_stages("Et|t|t|tL", "--num-virtual-stages-per-pipeline-rank", "1") == 1


def test_flags_without_effect_are_listed_in_one_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "--use-mcore-models --transformer-impl local --no-rope-fusion --attention-softmax-in-fp32 "
        "--context-parallel-size 1 --log-throughput --mtp-num-layers 0 --use-mcore-models --num-layers 2"
    ).split()
    assert changed(parse(*words)) == {"model.num_layers": 2}
    warning = capsys.readouterr().err
    assert warning.count("some flags have no effect here") == 1
    assert warning.count("is ignored: ") == 7
    assert "--transformer-impl is ignored: there is one implementation" in warning
    monkeypatch.setenv("RANK", "1")
    parse(*words)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        ("--fp8-format e4m3", "use --bf16"),
        ("--context-parallel-size 2", "--tensor-model-parallel-size"),
        ("--num-experts 8", "leave it out"),
        ("--moe-router-topk 2", "leave it out"),
        ("--decrease-batch-size-if-needed", "give sizes that divide"),
        ("--distribute-saved-activations", "leave it out"),
        ("--layernorm-epsilon 1e-6", "--norm-epsilon"),
        ("--yarn-mscale 1.0", "--use-rope-scaling"),
    ],
)
def test_flags_that_would_change_the_run_are_refused(
    words: str, way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *words.split())
    assert f"{words} is not supported: " in message
    assert way_out in message


def test_every_refusal_says_what_to_do() -> None:
    assert all("use " in entry.reason or "leave " in entry.reason for entry in REFUSED)


# What Megatron's users type, by its groups of options.
MEGATRON_FLAGS = """
--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --kv-channels --group-query-attention
--num-query-groups --max-position-embeddings --position-embedding-type --rotary-base --rotary-percent
--rotary-interleaved --rotary-seq-len-interpolation-factor --use-rope-scaling --rope-scaling-factor
--use-rotary-position-embeddings --no-position-embedding --normalization --norm-epsilon --apply-layernorm-1p --swiglu
--squared-relu --openai-gelu --disable-bias-linear --add-qkv-bias --qk-layernorm
--untie-embeddings-and-output-weights --make-vocab-size-divisible-by --apply-query-key-layer-scaling
--attention-softmax-in-fp32 --transformer-impl --attention-backend --use-flash-attn --init-method-std
--init-method-xavier-uniform --attention-dropout --hidden-dropout --window-size
--apply-residual-connection-post-layernorm --embedding-init-method-std --window-attn-skip-freq --softmax-scale
--layernorm-epsilon --use-mup --yarn-rotary-scaling-factor --mrope-section --qk-l2-norm --fp32-residual-connection
--heterogeneous-layers-config-path --hybrid-layer-pattern --cpu-offloading-num-layers --checkpoint-activations
--micro-batch-size --global-batch-size --rampup-batch-size --step-batch-size-schedule --train-iters --train-samples
--optimizer --lr --min-lr --lr-decay-style --lr-decay-iters --lr-decay-samples --lr-warmup-iters --lr-warmup-samples
--lr-warmup-fraction --lr-warmup-init --lr-wsd-decay-style --lr-wsd-decay-iters --weight-decay --start-weight-decay
--end-weight-decay --weight-decay-incr-style --clip-grad --adam-beta1 --adam-beta2 --adam-eps --sgd-momentum
--override-opt_param-scheduler --override-opt-param-scheduler --use-checkpoint-opt_param-scheduler
--use-checkpoint-opt-param-scheduler --seed --data-parallel-random-init --exit-interval --exit-duration-in-mins
--exit-signal-handler --manual-gc --manual-gc-interval --empty-unused-memory-level --calculate-per-token-loss
--cross-entropy-loss-fusion --deterministic-mode --no-check-for-nan-in-loss-and-grad
--bf16 --fp16 --loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis
--accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16 --fp16-lm-cross-entropy --fp8-format
--tensor-model-parallel-size --pipeline-model-parallel-size --num-layers-per-virtual-pipeline-stage
--num-virtual-stages-per-pipeline-rank --context-parallel-size --sequence-parallel --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size --no-overlap-p2p-communication --tp-comm-overlap
--distributed-backend --distributed-timeout-minutes --use-cpu-initialization --use-tp-pp-dp-mapping --local-rank
--use-mcore-models
--recompute-activations --recompute-granularity --recompute-method --recompute-num-layers --recompute-modules
--distribute-saved-activations --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion
--no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
--data-path --train-data-path --valid-data-path --test-data-path --data-args-path --per-split-data-args-path --split
--data-cache-path --mock-data --seq-length --num-workers --dataloader-type --reset-position-ids
--reset-attention-mask --eod-mask-loss --no-create-attention-mask-in-dataloader --no-mmap-bin-files
--num-dataset-builder-threads --tokenizer-type --tokenizer-model --vocab-file --merge-file --vocab-size
--vocab-extra-ids
--save --load --save-interval --no-save-optim --no-save-rng --no-load-optim --no-load-rng --finetune --ckpt-format
--ckpt-step --async-save --use-checkpoint-args --exit-on-missing-checkpoint --dist-ckpt-optim-fully-reshardable
--dist-ckpt-strictness --eval-iters --eval-interval --skip-train --log-interval --log-throughput --log-params-norm
--log-num-zeros-in-grad --log-timers-to-tensorboard --log-memory-to-tensorboard --log-validation-ppl-to-tensorboard
--tensorboard-dir --tensorboard-log-interval --timing-log-level --timing-log-option --wandb-project --wandb-exp-name
--wandb-save-dir --wandb-entity --profile --profile-step-start --profile-step-end --profile-ranks
--use-pytorch-profiler --yaml-cfg
--bert-no-binary-head --mask-prob --short-seq-prob --encoder-num-layers --decoder-num-layers --encoder-seq-length
--decoder-seq-length
""".split()


@pytest.mark.parametrize("flag", MEGATRON_FLAGS)
def test_every_flag_of_megatron_is_ours_or_answered_by_name(flag: str) -> None:
    ours = {name for entry in FIELDS for name in (entry.flag, entry.off_flag) if name}
    ours |= {alias.flag for alias in ALIASES} | {"--num-layers-per-virtual-pipeline-stage"}
    if flag in ours:
        return
    known = answer(flag, [])
    assert known is not None
    assert known.reason
    if isinstance(known, Refused):
        assert "use " in known.reason or "leave " in known.reason


GPT_3 = """
--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
--attention-backend auto --micro-batch-size 1 --global-batch-size 1536 --train-iters 500000 --weight-decay 0.1
--adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --bf16 --lr 6.0e-5 --lr-decay-style cosine
--min-lr 6.0e-6 --lr-warmup-iters 430 --lr-decay-iters 430000 --tensor-model-parallel-size 8
--pipeline-model-parallel-size 16 --num-layers-per-virtual-pipeline-stage 2 --sequence-parallel
--data-path corpus_text_document --tokenizer-type HuggingFaceTokenizer --tokenizer-model gpt2/tokenizer.json
--split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --save checkpoints --load checkpoints
--eval-iters 10 --tensorboard-dir tensorboard --use-mcore-models --transformer-impl transformer_engine
--accumulate-allreduce-grads-in-fp32 --no-masked-softmax-fusion --ckpt-format torch_dist
--recompute-granularity full --recompute-method uniform --recompute-num-layers 1
""".split()

LLAMA_3_8B = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
--position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0
--swiglu --init-method-std 0.0134 --attention-backend fused --normalization RMSNorm
--untie-embeddings-and-output-weights --disable-bias-linear --no-position-embedding --micro-batch-size 1
--global-batch-size 128 --train-iters 10000 --lr 0.00015 --min-lr 0.00001 --lr-decay-style cosine
--lr-warmup-iters 500 --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
--cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1
--tensor-model-parallel-size 2 --context-parallel-size 1 --pipeline-model-parallel-size 1 --sequence-parallel
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --mock-data --tokenizer-type NullTokenizer
--vocab-size 128256 --split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1
--log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile
--profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60
--save checkpoints --load checkpoints --tensorboard-dir tensorboard
""".split()


def test_flags_of_a_gpt_3_script_parse() -> None:
    config = parse(*GPT_3)
    assert validate(config, 1024) == []
    assert config.parallel.num_virtual_stages_per_pipeline_rank == 3
    assert resolve(config, 1024).parallel.pipeline_schedule == "interleaved"


def test_flags_of_a_llama_script_parse() -> None:
    config = parse(*LLAMA_3_8B)
    assert validate(config, 64) == []
    assert (config.model.position_embedding_type, config.model.activation) == ("rope", "swiglu")
    assert not config.model.tie_embeddings
    assert not config.model.add_bias_linear


def test_flags_of_an_old_script_parse() -> None:
    float16 = "--fp16 --initial-loss-scale 65536 --min-loss-scale 1.0 --loss-scale-window 500 --hysteresis 2".split()
    old = [*float16, *"--rampup-batch-size 16 16 5859375".split(), *(word for word in GPT_3 if word != "--bf16")]
    old += "--lr-warmup-iters 0 --lr-warmup-fraction .001 --override-opt_param-scheduler".split()
    config = parse(*old)
    assert validate(config, 1024) == []
    training = config.training
    assert training.fp16
    assert (training.loss_scale, training.initial_loss_scale, training.loss_scale_window) == (None, 2**16, 500)
    assert (config.optimizer.lr_warmup_fraction, config.optimizer.use_checkpoint_opt_param_scheduler) == (0.001, False)


def test_the_schedule_comes_from_the_command_line_or_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-opt-param-scheduler"):
        assert parse(flag).optimizer.use_checkpoint_opt_param_scheduler
        message = refused(capsys, flag, "--override-opt_param-scheduler")
        assert f"{flag} and --override-opt_param-scheduler contradict each other" in message


def test_help_is_grouped_and_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse("--num-layers", "wrong", "--help")
    assert leaving.value.code == 0
    output = capsys.readouterr().out
    for section in ("model", "parallel", "training", "optimizer", "data", "checkpoint", "logging", "aliases"):
        assert f"\n{section}:\n" in output
    for entry in FIELDS:
        assert f"  {entry.flag} " in output or f"  {entry.flag}\n" in output
    one_line = " ".join(output.split())
    assert "divided by sqrt(2 x layers) (default: 0.02)" in one_line
    assert "number of transformer layers (required)" in one_line


def test_help_on_a_word_shows_what_has_to_do_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse("--num-layers", "4", "--help", "WARMUP")
    assert leaving.value.code == 0
    output = capsys.readouterr().out
    flags = {line.split()[0] for line in output.splitlines() if line.startswith("  --")}
    assert flags == {
        "--config",
        "--lr-warmup-iters",
        "--lr-warmup-samples",
        "--lr-warmup-fraction",
        "--lr-warmup-init",
    }
    assert "\nmodel:" not in output
    with pytest.raises(SystemExit):
        parse("--help", "moe")
    assert "  --moe-* is not supported: layers are dense; leave it out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse("--help", "Rotray")
    assert capsys.readouterr().out.endswith("\nno flag has to do with Rotray; did you mean rotary?\n")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("torchrun --nproc-per-node 2 pretrain_gpt.py --rotary-p", ["--rotary-percent"]),
        ("python pretrain_gpt.py --lr-decay-style c", ["constant", "cosine"]),
        ("python ./pretrain_gpt.py --override-opt_", ["--override-opt_param-scheduler"]),
        ("python another.py --lr", []),
    ],
)
def test_bash_completes_flags_and_their_values(line: str, wanted: list[str]) -> None:
    words = line.split()
    script = (
        f"source <({sys.executable} -m megallm.config completion bash); COMP_WORDS=({line}); "
        f"COMP_CWORD={len(words) - 1}; _megallm; echo ${{COMPREPLY[@]}}"
    )
    output = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.split() == wanted


def test_zsh_gets_the_script_of_bash() -> None:
    assert completion_script("zsh").endswith(completion_script("bash"))
    assert completion_script("zsh").startswith("autoload -U +X bashcompinit && bashcompinit\n")


def test_configuration_and_plan_need_neither_torch_nor_numpy() -> None:
    command = (
        "import sys, megallm.config, megallm.config.documentation, megallm.plan.validate, megallm.plan.split; "
        "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


def test_other_processes_of_a_machine_wait_to_be_ended_before_they_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("megallm.config.report.time.sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "--lr needs a value" in refused(capsys, "--lr")
    assert waits == []
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert "--lr needs a value" in refused(capsys, "--lr")
    assert waits == [10.0]


def test_building_from_paths() -> None:
    assert build({"model.num_layers": 3}).model.num_layers == 3
