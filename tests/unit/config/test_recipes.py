"""Every recipe of examples/ is planned, fits, and needs what its second line says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import pretrain_bert
import pretrain_gpt

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
EXPECTED = re.compile(
    r"# Expected on (\d+) x H100 \(--dry-run --world-size \1\): ([\d.]+) GiB on the fullest GPU, "
    r"bubble ([\d.]+)%, ([\d.]+) s a step\."
)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=recipe.stem, marks=() if recipe.stem == "125m_1gpu" else pytest.mark.slow)
        for recipe in RECIPES
    ],
)
def test_a_recipe_needs_what_it_says(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    found = EXPECTED.fullmatch(recipe.read_text().splitlines()[1])
    assert found, f"{recipe.name} does not say what to expect"
    gpus, gib, percent, seconds = found.groups()
    program = pretrain_bert if "architecture: bert" in recipe.read_text() else pretrain_gpt
    program.main(["--config", str(recipe), "--dry-run", "--json", "--world-size", gpus])
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory_share"] <= 0.8
    assert plan["memory_peak_bytes"] / 2**30 == pytest.approx(float(gib), rel=0.03)
    assert 100 * plan["bubble"] == pytest.approx(float(percent), abs=0.5)
    assert plan["seconds"]["step"] == pytest.approx(float(seconds), rel=0.03)
    model = float(recipe.stem.split("_")[0].rstrip("mb")) * (1e6 if "m_" in recipe.stem else 1e9)
    assert plan["parameters"] == pytest.approx(model, rel=0.08)


def test_there_are_recipes_from_one_gpu_to_many_machines() -> None:
    assert {recipe.stem.split("_")[0] for recipe in RECIPES} == {"110m", "125m", "1.3b", "7b", "13b", "70b"}
    assert {int(re.findall(r"(\d+)gpu", recipe.stem)[0]) for recipe in RECIPES} >= {1, 8, 128}
