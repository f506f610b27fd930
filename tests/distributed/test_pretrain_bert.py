"""pretrain_bert.py from text to a trained model in two layouts, and what it answers to checkpoints of other models."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megallm.config import Config, parse_arguments, resolve
from megallm.convert.native import open_native
from megallm.convert.verify import judge, our_logits
from megallm.mesh import Mesh, MeshShape
from megallm.train.hugging_face import with_hugging_face_model
from megallm.train.loop import pretrain_on
from megallm.train.saved_arguments import with_saved_model
from megallm.train.tasks.bert import BERTTask
from megallm.train.tasks.gpt import GPTTask
from megallm.train.trained import Placement, trained_model
from tests.distributed.launch import (
    LAUNCHER_VARIABLES,
    ROOT,
    TINY,
    read_lines,
    training_lines,
    validation_lines,
    without,
)
from tests.distributed.pool import WorkerPool


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_text_to_a_trained_bert(tmp_path: Path) -> None:
    """The commands of examples/bert.sh, for ten steps: tensor 2 and pipeline 2 x 2, then data 2."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= {
        "BERT_STEPS": "10",
        "BERT_MEGABYTES": "1",
        "BERT_FOLDER": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "examples/bert.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (training_lines(tmp_path / f"{name}_layout.jsonl") for name in ("first", "second"))
    assert [line["iteration"] for line in first + second] == list(range(1, 11))
    losses = [line["lm_loss"] for line in first + second]
    assert losses[0] == pytest.approx(7.7, abs=0.5), "about as many nats as ln 2048 at the start"
    assert losses[5] == pytest.approx(losses[4], abs=0.6), "the loss goes on where it was"
    assert losses[5] < losses[0] - 0.4 and losses[9] < losses[0] - 0.6
    # So few steps teach the order of texts to nobody: a coin's ln 2.
    assert sum(line["sop_loss"] for line in second) / 5 == pytest.approx(0.69, abs=0.2)
    checks = [validation_lines(tmp_path / f"{name}_layout.jsonl")[0] for name in ("first", "second")]
    assert checks[1]["valid_lm_loss"] < checks[0]["valid_lm_loss"]
    assert all("valid_sop_loss" in check for check in checks)


def configuration(architecture: str, *flags: str) -> Config:
    config = parse_arguments([*TINY, *flags], prog="test", description="", architecture=architecture)
    return resolve(config, 1)


def run_both(rank: int, folder: str) -> dict[str, str]:
    """Trains one of each, and collects what is said where a checkpoint of the other kind is given."""
    gpt, bert = f"{folder}/gpt", f"{folder}/bert"
    tasks = {"gpt": GPTTask.from_config, "bert": BERTTask.from_config}
    said = {}

    def train(name: str, architecture: str, *flags: str) -> None:
        try:
            with_log = ("--metrics-jsonl", f"{folder}/{name}.jsonl", *flags)
            mesh = Mesh(MeshShape(), rank, torch.device("cpu"))
            pretrain_on(mesh, configuration(architecture, *with_log), tasks[architecture], time.monotonic())
        except ValueError as error:
            said[name] = str(error)

    train("gpt", "gpt", "--save", gpt)
    train("bert", "bert", "--save", bert)
    train("gpt from bert", "gpt", "--load", bert)
    train("bert from gpt", "bert", "--load", gpt, "--finetune", "--allow-model-change")
    train("bert without pairs", "bert", "--load", bert, "--bert-no-binary-head")
    train("other masks", "bert", "--load", bert, "--mask-prob", "0.3", "--train-iters", "8")
    try:
        with_saved_model(configuration("bert", "--load", gpt, "--use-checkpoint-args"))
    except ValueError as error:
        said["arguments of gpt"] = str(error)
    try:
        with trained_model(bert, Placement()):
            pass
    except ValueError as error:
        said["generate"] = str(error)
    return said


@pytest.mark.slow
def test_each_program_has_its_own_checkpoints(pool: WorkerPool, tmp_path: Path) -> None:
    (said,) = pool.run(1, run_both, str(tmp_path))
    assert "holds a bert, and this program trains a gpt: give it to pretrain_bert.py" in said.pop("gpt from bert")
    assert "holds a gpt, and this program trains a bert: give it to pretrain_gpt.py" in said.pop("bert from gpt")
    assert "holds a gpt, and this program trains a bert" in said.pop("arguments of gpt")
    assert "bert_binary_head is True there and False here" in said.pop("bert without pairs")
    assert "share of masked tokens: 0.15 there, 0.3 here (other tokens are to be found)" in said.pop("other masks")
    assert "holds a bert, which finds masked words; a text is continued and its perplexity told by" in said.pop(
        "generate"
    )
    assert not said
    lines = read_lines(tmp_path / "bert.jsonl")
    losses = [line["lm_loss"] for line in lines if "lm_loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    assert all(line["sop_loss"] == pytest.approx(0.69, abs=0.1) for line in lines if "lm_loss" in line)


def run_from_hugging_face(rank: int, folder: str, root: str) -> None:
    """Six steps from the model in `folder`; leaves checkpoints and a Hugging Face folder under `root`."""
    of_the_folder = ("--num-layers", "--hidden-size", "--num-attention-heads", "--vocab-size")
    flags = [*without(TINY, *of_the_folder), "--load-hf", folder, "--save-hf", f"{root}/hf", "--save", f"{root}/ours"]
    flags += ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    config = parse_arguments(flags, prog="test", description="", architecture="bert")
    config = resolve(with_hugging_face_model(config), 4)
    mesh = Mesh(MeshShape(tp=2, pp=2), rank, torch.device("cpu"))
    pretrain_on(mesh, config, BERTTask.from_config, time.monotonic())


@pytest.mark.slow
def test_a_bert_of_hugging_faces_goes_on_and_goes_back(pool: WorkerPool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 51, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BertConfig(
        **settings, intermediate_size=48, max_position_embeddings=20, initializer_range=0.2, use_cache=False
    )
    model = transformers.BertForPreTraining(config).double()
    model.save_pretrained(tmp_path / "theirs")
    pool.run(4, run_from_hugging_face, str(tmp_path / "theirs"), str(tmp_path))
    tokens = torch.arange(17) * 7 % 51
    exported = transformers.BertForPreTraining.from_pretrained(
        tmp_path / "hf" / "iter_0000006", dtype=torch.float64
    ).eval()
    before, after = (
        one.eval()(input_ids=tokens.unsqueeze(0)).prediction_logits[0].detach() for one in (model, exported)
    )
    assert judge(before, after, tokens, "bert").share > 1e-3, "the model is meant to have moved"
    with open_native(tmp_path / "ours" / "iter_0000006") as weights:
        assert judge(after, our_logits(weights, tokens, torch.float64), tokens, "bert").share < 1e-10
        assert judge(after.float(), our_logits(weights, tokens), tokens, "bert").share < 1e-5
