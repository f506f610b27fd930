"""Which GPUs a compiled architecture serves, and what the report of the machine says."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from megallm import info
from megallm.config.operators import OPERATORS, OTHERS, parse_choices
from megallm.ops import library
from megallm.ops.library import NativeLibrary, check_choices, load


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        (("8.0", "9.0+PTX"), (8, 0), True),
        (("8.0", "9.0+PTX"), (8, 9), True),
        (("8.0", "9.0+PTX"), (7, 5), False),
        (("8.0", "9.0+PTX"), (9, 0), True),
        (("8.0", "9.0+PTX"), (10, 0), True),
        (("8.0", "9.0"), (10, 0), False),
        (("8.6",), (8, 0), False),
        (("9.0a",), (9, 0), True),
        (("9.0a",), (10, 0), False),
        (("Hopper",), (9, 0), False),
        ((), (9, 0), False),
    ],
)
def test_architectures_cover(architectures, capability, served):
    assert NativeLibrary(loaded=True, cuda_architectures=architectures, reason="").covers(capability) is served


def test_what_a_library_serves():
    cpu, elsewhere = torch.ones(1), torch.ones(1, device="meta")
    unused = NativeLibrary(loaded=True, cuda_architectures=(), reason="chosen")
    assert not unused.serves("rms_norm", cpu, "auto")
    assert unused.serves("rms_norm", cpu, "native"), "what a run asks for by name goes before the process's default"
    used = NativeLibrary(loaded=True, cuda_architectures=("9.0",), reason="")
    assert used.serves("rms_norm", cpu, "auto")
    assert not used.serves("rms_norm", elsewhere, "auto")
    for implementation in ("reference", "torch", "apex"):
        assert not used.serves("rms_norm", cpu, implementation)
    with pytest.raises(RuntimeError, match="not built for meta"):
        used.serves("rms_norm", elsewhere, "native")


def test_a_library_older_than_the_code_serves_what_it_has():
    old = NativeLibrary(loaded=True, cuda_architectures=(), reason="", on_cpu=frozenset())
    assert not old.serves("rms_norm", torch.ones(1), "auto")
    with pytest.raises(RuntimeError, match="native rms_norm was asked for"):
        old.serves("rms_norm", torch.ones(1), "native")


def test_choices_for_all_operators_and_for_single_ones():
    assert parse_choices([]).of("rms_norm") == "auto"
    assert parse_choices(["native", "rms_norm=torch"]).of("rms_norm") == "torch"
    assert parse_choices(["reference"]).of("rms_norm") == "reference"
    for words in (["native", "auto"], ["rms_norm=native", "rms_norm=auto"], ["=native"], ["rms_norm="]):
        with pytest.raises(ValueError, match="; use --ops "):
            parse_choices(words)


def test_a_library_counts_only_for_the_operators_it_has(monkeypatch):
    monkeypatch.setitem(OTHERS, "apex", frozenset())
    assert parse_choices(["apex"]).of("rms_norm") == "auto"
    with pytest.raises(ValueError, match="apex has no rms_norm; use --ops rms_norm=auto"):
        parse_choices(["rms_norm=apex"])


def test_a_choice_that_this_machine_lacks_is_refused(monkeypatch):
    device = torch.device("cpu")
    for words in ([], ["reference"], ["torch"]):
        check_choices(parse_choices(words), device)
    monkeypatch.setattr(library, "NATIVE", NativeLibrary(False, (), "not there", frozenset(), frozenset()))
    with pytest.raises(ValueError, match=r"the native rms_norm was asked for.*not there.*use --ops auto"):
        check_choices(parse_choices(["rms_norm=native"]), device)
    if not library.other_library("apex"):
        with pytest.raises(ValueError, match="apex was asked for rms_norm, but is not installed here"):
            check_choices(parse_choices(["apex"]), device)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="auto, native or reference"):
        load("fast")


@pytest.mark.slow
def test_info_in_both_forms():
    printed = subprocess.run(
        [sys.executable, "-m", "megallm.info", "--json"], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(printed.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["native_operators"]["built"] in (True, False)
    assert list(found["operators"]) == list(OPERATORS)
    text = info.describe(found)
    assert "native operators" in text
    assert torch.__version__ in text


def test_info_says_what_is_missing():
    found = info.collect()
    found["native_operators"] = {"built": False, "in_use": False, "reason": "hidden", "cuda_architectures": []}
    found["operators"]["rms_norm"] = {"built_for": [], "in_use": "reference", "choices": ["reference"]}
    found["data_helpers"] = {"built": False}
    text = info.describe(found)
    assert "not in use: hidden" in text
    assert re.search("  rms_norm +not built, in use: reference, choices: reference", text)
    assert "not built; numpy does their work" in text


@pytest.mark.slow
def test_info_tells_what_the_environment_asks_for_in_vain():
    command, environment = [sys.executable, "-m", "megallm.info"], {**os.environ, "MEGALLM_OPS": "fast"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2
    assert ran.stderr == "python -m megallm.info: MEGALLM_OPS='fast' is not known: use auto, native or reference.\n"
