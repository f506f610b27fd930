"""Which GPUs a compiled architecture serves, and what the report of the machine says."""

import json
import subprocess
import sys

import pytest
import torch

from megallm import info
from megallm.ops.library import NativeLibrary, load


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


def test_a_library_out_of_use_serves_nothing():
    assert not NativeLibrary(loaded=True, cuda_architectures=(), reason="chosen").serves(torch.ones(1))
    assert NativeLibrary(loaded=True, cuda_architectures=(), reason="").serves(torch.ones(1))
    assert not NativeLibrary(loaded=True, cuda_architectures=("9.0",), reason="").serves(torch.ones(1, device="meta"))


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="auto, native or reference"):
        load("fast")


def test_info_in_both_forms():
    printed = subprocess.run(
        [sys.executable, "-m", "megallm.info", "--json"], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(printed.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["native_operators"]["built"] in (True, False)
    text = info.describe(found)
    assert "native operators" in text
    assert torch.__version__ in text


def test_info_says_what_is_missing():
    found = info.collect()
    found["native_operators"] = {"built": False, "in_use": False, "reason": "hidden", "cuda_architectures": []}
    found["data_helpers"] = {"built": False}
    text = info.describe(found)
    assert "not in use: hidden" in text
    assert "not built; numpy does their work" in text
