"""Benchmarks of whole models: what they count with, and that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import layer  # noqa: E402
import llama  # noqa: E402
import start_up  # noqa: E402
import train_7b  # noqa: E402

from megallm.plan.flops import flops_per_token, head_flops_per_token  # noqa: E402
from megallm.plan.gpus import GPUS  # noqa: E402


def test_layers_and_output_layer_are_the_model() -> None:
    config = llama.configuration("7b", 1, 8)
    whole, of_layer = flops_per_token(config.model, 4096), layer.flops_of_layer(config)
    assert whole.weights == 32 * of_layer.weights + head_flops_per_token(config.model, 4096)
    assert whole.half == pytest.approx(42.86e9, rel=1e-3)


def test_the_roofline_of_a_layer_is_that_of_a_count_by_hand() -> None:
    """6.30 ms for the products, 0.61 for attention, and 1,526 MB for the rest."""
    config = llama.configuration("7b", 1, 1)
    gpu = replace(GPUS["H200"], flops=790e12, bandwidth=4.3e12)
    bound = layer.roofline(config, layer.flops_of_layer(config), gpu)
    assert bound["products"] == pytest.approx(3 * 1657.9e9 / 790e12, rel=1e-3)
    assert bound["attention"] == pytest.approx(3.5 * 137.4e9 / 790e12, rel=1e-3)
    assert bound["the rest"] == pytest.approx(1526e6 / 4.3e12, rel=1e-3)


def test_utilisation_is_told_in_both_conventions_where_the_peak_is_known() -> None:
    flops = flops_per_token(llama.configuration("7b", 1, 8).model, 4096)
    found = llama.rates(flops, 15_000, 1.0, GPUS["H200"])
    assert found["mfu_half_attention"] == pytest.approx(15_000 * 42.86e9 / 989.4e12, rel=1e-3)
    assert found["mfu_full_attention"] == pytest.approx(15_000 * 46.08e9 / 989.4e12, rel=1e-3)
    assert "mfu_half_attention" not in llama.rates(flops, 15_000, 1.0, None)


@pytest.mark.slow
def test_they_run_on_a_cpu(tmp_path: Path) -> None:
    layer.main(["--device", "cpu", "--micro-batches", "1", "--repeats", "2", "--output", str(tmp_path / "layer.json")])
    (result,) = json.loads((tmp_path / "layer.json").read_text())["results"]
    assert sum(result["shares"].values()) == pytest.approx(1.0, abs=1e-3)
    assert all(share > 0 for share in result["shares"].values())
    train_7b.main(["--device", "cpu", "--steps", "2", "--output", str(tmp_path / "train.json")])
    record = json.loads((tmp_path / "train.json").read_text())
    assert record["steps"] == 2 and record["num_micro_batches"] == 8
    assert record["tokens_per_second"] == pytest.approx(
        record["tokens_per_step"] / record["seconds_per_step"], rel=1e-3
    )
    assert record["predicted"]["by measured rates"]["allocated_bytes"] > 0


@pytest.mark.slow
def test_start_up_waits_for_what_is_said_and_else_for_the_end() -> None:
    assert start_up.seconds(start_up.COMMANDS["help"]) > 0
    with pytest.raises(RuntimeError, match="ended with 0"):
        start_up.seconds(start_up.Command("pretrain_gpt.py", "--help", start_up.FIRST_STEP))
    with pytest.raises(RuntimeError, match="1 problem in the configuration"):
        start_up.seconds(start_up.Command("pretrain_gpt.py", start_up.GPT + " --num-layers -1"))


def test_on_a_bare_checkout_they_find_the_package() -> None:
    """With a program in Python's place that says where it would look for packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = ["make", "--silent", "gpu-bench", "PYTHON=printenv PYTHONPATH; true"]
    ran = subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == ["."] * 5, ran.stderr
