"""How close conversion comes to a plain copy of the same bytes, and how much memory it takes.

    python benchmarks/convert.py [--layers 32 --hidden 4096 --ffn 11008 --vocab 32000] [--output [FILE]]

A Llama of that shape (by default a small one) is made up in bfloat16 as a Hugging Face folder. Then it is copied, file
by file; converted to a checkpoint of ours, to a Hugging Face folder again, and to Megatron's format for two tensor
ranks. Everything that is written is flushed to the disk. Each is a process of its own: its time on the clock includes
its start, its memory is the largest that it had. What was written before is removed first. The copy stands first and
last, and its mean is what the others are compared with: with their start (Python and torch are loaded), and without.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, machine, write

from megallm.config.tree import ModelConfig
from megallm.convert.huggingface import write_folder
from megallm.convert.model import Weights, config_of, logical_shapes

DEFAULT_OUTPUT = RESULTS / "convert.json"
TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py"
COPY = """
import os, shutil, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.mkdir()
for path in source.iterdir():
    shutil.copyfile(path, target / path.name)
    with open(target / path.name, "rb+") as file:
        os.fsync(file.fileno())
"""


class MadeUp:
    """Tensors of one set of random values, of whatever size."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.dtypes = dict.fromkeys(shapes, torch.bfloat16)
        self._values = torch.randn(2**22, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)

    def fill(self, name: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        for begin in range(0, len(flat), len(self._values)):
            part = flat[begin : begin + len(self._values)]
            part.copy_(self._values[: len(part)])


def make(folder: Path, arguments: argparse.Namespace) -> None:
    model = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        ffn_hidden_size=arguments.ffn,
        num_attention_heads=arguments.hidden // 128,
        max_position_embeddings=4096,
        vocab_size=arguments.vocab,
        position_embedding_type="rope",
        normalization="RMSNorm",
        activation="swiglu",
        add_bias_linear=False,
        tie_embeddings=False,
    )
    config = config_of(model)
    shapes = logical_shapes(config)
    write_folder(folder, Weights(config, shapes, MadeUp(shapes)))


def measured(command: list[str], target: Path) -> dict[str, float]:
    """Seconds on the clock, and the largest memory of the process in GB."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"{command} failed")
    return {"seconds": round(seconds, 2), "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 3)}


def run(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    theirs, ours = root / "theirs", root / "ours"
    # In a process of its own: children inherit the largest memory of this one.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(theirs, arguments))
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit("the model could not be made")
    num_bytes = sum(path.stat().st_size for path in theirs.iterdir())

    def tool(source: str, load: Path, target: str, *more: str) -> list[str]:
        return [str(TOOL), "--from", source, "--load", str(load), "--to", target, "--save", str(root / target), *more]

    copy = ["-c", COPY, str(theirs), str(root / "copy")]
    start = ["-c", "import megallm.convert.command"]
    results = {"start, first": measured(start, root / "nothing"), "copy, first": measured(copy, root / "copy")}
    shutil.rmtree(root / "copy")
    results["hf to megallm"] = measured(tool("hf", theirs, "megallm"), root / "megallm")
    (root / "megallm").rename(ours)
    results["megallm to hf"] = measured(tool("megallm", ours, "hf"), root / "hf")
    shutil.rmtree(root / "hf")
    shutil.rmtree(ours)
    layout = ("--target-tensor-parallel-size", "2")
    results["hf to megatron, tensor 2"] = measured(tool("hf", theirs, "megatron", *layout), root / "megatron")
    shutil.rmtree(root / "megatron")
    results["copy, last"] = measured(copy, root / "copy")
    results["start, last"] = measured(start, root / "nothing")
    plain, start_up = (
        (results[f"{name}, first"]["seconds"] + results[f"{name}, last"]["seconds"]) / 2 for name in ("copy", "start")
    )
    for name, result in results.items():
        if not name.startswith("start"):
            result["gb_per_second"] = round(num_bytes / 1e9 / result["seconds"], 3)
            result["share_of_copy"] = round(plain / result["seconds"], 3)
        if " to " in name:
            result["share_of_copy_without_start"] = round(plain / (result["seconds"] - start_up), 3)
        print(f"{name:26} {result}", flush=True)
    largest = max(arguments.vocab, arguments.ffn) * arguments.hidden * 2
    return {"gb": round(num_bytes / 1e9, 3), "largest_tensor_gb": largest / 1e9, **results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--folder", help="where to work; default: the system's folder for temporary files")
    parser.add_argument("--output", nargs="?", const=str(DEFAULT_OUTPUT), help="write the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        results = run(Path(root), arguments)
    shape = {name: getattr(arguments, name) for name in ("layers", "hidden", "ffn", "vocab")}
    print(json.dumps({"shape": shape, **results}, indent=2))
    if arguments.output:
        write(Path(arguments.output), {"machine": machine("torch"), "shape": shape, **results})


if __name__ == "__main__":
    main()
