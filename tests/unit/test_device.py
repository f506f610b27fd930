"""What a process asks of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from megallm.device import use_one_thread_per_process

# Page faults of one tensor after another, each as large as what the one before gave back. The first ones may lie side
# by side: glibc needs room for their alignment.
PROGRAM = """
import resource, torch
from megallm.config.dictionary import build
from megallm.train.processes import joined_processes
settings = {
    **{"training.device": "cpu", "training.train_iters": 1, "training.micro_batch_size": 1, "optimizer.lr": 1.0},
    **{"model.num_layers": 1, "model.hidden_size": 8, "model.num_attention_heads": 1, "model.vocab_size": 8},
    **{"model.max_position_embeddings": 16, "data.seq_length": 16, "data.mock_data": True},
    **{"data.tokenizer_type": "NullTokenizer"},
}
with joined_processes(build(settings)):
    for _ in range(20):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_what_a_training_process_frees_is_not_zeroed_by_the_system_again() -> None:
    # The converter, where a test has called it, asks torch for large pages: one fault is then for many.
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    faults = [int(line) for line in run.stdout.split()[-20:]]
    pages = 2**26 // 4096
    assert faults[0] > pages / 2
    assert sum(faults[10:]) < pages / 10


@pytest.mark.parametrize("threads", ["abc", "", "0", "4,2"])
def test_threads_that_are_no_number_are_a_sentence(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with pytest.raises(ValueError, match=f"OMP_NUM_THREADS is '{threads}', no number of threads for each of the 2"):
        use_one_thread_per_process(2)
