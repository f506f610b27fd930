"""Saving and loading a checkpoint: against plain files of the same bytes, and against torch.distributed.checkpoint.

    python benchmarks/checkpoint.py [--layers 12] [--repetitions 5] [--folder FOLDER] [--output [FILE]]

One process holds a model of 768 channels with AdamW's state, 1.2 GB by default. It saves it with everything that a save
does (checksums, manifest, flushes, the rename), and loads it with every byte compared. Beside it, on the same disk:

- a plain file: the same bytes written from memory in pieces of 16 MiB and flushed to the disk, and read into memory;
- a plain copy: that file read and written to another one, which is flushed;
- torch.distributed.checkpoint with the same tensors (FileSystemWriter, which flushes too), and its async_save.

Contenders take turns; before each read the file's pages are dropped from memory. What the checksums cost is the
difference to saves that take none, between the fastest of each. The stall of a save in the background is all the time
that training lost by it, by the copy and by what the writing took from the steps meanwhile, in steps. A step here takes
one sequence of 128 tokens. All other figures are medians, with their range.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from record import RESULTS, machine, write
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from megallm.checkpoint import shard_file
from megallm.checkpoint.background import BackgroundSaver
from megallm.checkpoint.boxes import LocalBox, local_boxes
from megallm.checkpoint.retention import Retention
from megallm.checkpoint.shard_file import bytes_of
from megallm.checkpoint.stream import PIECE_BYTES
from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.mesh import Mesh, MeshShape
from megallm.train.engine import Engine, build_engine
from megallm.train.resume import load_engine
from megallm.train.saving import content_of, save_engine
from megallm.train.step import train_step
from megallm.train.tasks.gpt import GPTTask

HIDDEN_SIZE, VOCAB_SIZE, SEQ_LENGTH = 768, 8000, 128
STEPS_OF_A_BLOCK = 3
DEFAULT_OUTPUT = RESULTS / "checkpoint.json"


def make_engine(num_layers: int) -> Engine:
    settings = {
        "model.num_layers": num_layers,
        "model.hidden_size": HIDDEN_SIZE,
        "model.num_attention_heads": 12,
        "model.vocab_size": VOCAB_SIZE,
        "training.micro_batch_size": 1,
        "training.train_iters": 10_000,
        "optimizer.lr": 3e-4,
        "data.seq_length": SEQ_LENGTH,
        "data.mock_data": True,
    }
    mesh = Mesh(MeshShape(), 0, torch.device("cpu"))
    config = resolve(build(settings), 1)
    engine = build_engine(config, GPTTask.from_config(config), mesh)
    take_step(engine)
    return engine


def take_step(engine: Engine) -> None:
    text = torch.randint(0, VOCAB_SIZE, (1, SEQ_LENGTH + 1))
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": torch.ones(1, SEQ_LENGTH),
        "position_ids": torch.arange(SEQ_LENGTH).expand(1, SEQ_LENGTH),
        "sample_ids": torch.zeros(1, dtype=torch.int64),
    }
    train_step(engine, [batch])


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def drop_from_memory(folder: Path) -> None:
    """The next read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class PlainFile:
    """The bytes of all boxes, in a file and nothing else."""

    def __init__(self, folder: Path, boxes: list[LocalBox]) -> None:
        self.folder, self._boxes = folder, boxes
        self._copy = [torch.empty_like(box.tensor) for box in boxes]

    def save(self) -> None:
        self.folder.mkdir()
        with open(self.folder / "written", "wb", buffering=0) as file:
            for box in self._boxes:
                data = bytes_of(box.tensor)
                for at in range(0, len(data), PIECE_BYTES):
                    file.write(data[at : at + PIECE_BYTES])
            os.fsync(file.fileno())

    def load(self) -> None:
        with open(self.folder / "written", "rb", buffering=0) as file:
            for tensor in self._copy:
                data = bytes_of(tensor)
                for at in range(0, len(data), PIECE_BYTES):
                    file.readinto(data[at : at + PIECE_BYTES])

    def copy(self) -> None:
        written, copied = self.folder / "written", self.folder / "copied"
        with open(written, "rb", buffering=0) as source, open(copied, "wb", buffering=0) as target:
            while piece := source.read(PIECE_BYTES):
                target.write(piece)
            os.fsync(target.fileno())


class TorchCheckpoint:
    """The same tensors by torch's own means."""

    def __init__(self, folder: Path, boxes: list[LocalBox]) -> None:
        self.folder = folder
        self._state = {box.key: box.tensor for box in boxes}
        self._other = {box.key: torch.empty_like(box.tensor) for box in boxes}

    def save(self) -> None:
        dcp.save(self._state, storage_writer=dcp.FileSystemWriter(self.folder))

    def load(self) -> None:
        dcp.load(self._other, storage_reader=dcp.FileSystemReader(self.folder))

    def start_saving(self) -> Callable[[], object]:
        response = dcp.async_save(self._state, storage_writer=dcp.FileSystemWriter(self.folder))
        assert not isinstance(response, AsyncSaveResponse), "it is a future"
        return response.result


class Ours:
    """A save and a load as a run does them."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self._engine = folder, engine
        self._saver = BackgroundSaver(engine.mesh.new_hosts(), lambda outcome, seconds: None)

    def save(self) -> None:
        save_engine(self._engine, str(self.folder))

    def save_without_checksums(self) -> None:
        def no_digests(data: memoryview) -> list[str]:
            return ["0" * 16] * -(-len(data) // shard_file.CHUNK_BYTES)

        with mock.patch.object(shard_file, "digests", no_digests):
            self.save()

    def load(self) -> None:
        load_engine(self._engine, str(self.folder))

    def start_saving(self) -> Callable[[], object]:
        boxes, state = content_of(self._engine, {})
        self._saver.start(str(self.folder), self._engine.progress.iteration, boxes, state, Retention())
        return self._saver.wait

    def close(self) -> None:
        self._saver.close()


def stall_in_steps(
    engine: Engine, start_saving: Callable[[], Callable[[], object]], folder: Path
) -> tuple[float, float]:
    """Time that a block of steps loses by a save that begins before it and ends within it or after, in steps: by the
    copy, and altogether.
    """
    undisturbed = seconds(lambda: [take_step(engine) for _ in range(STEPS_OF_A_BLOCK)])
    begin = time.perf_counter()
    finish = start_saving()
    copied = time.perf_counter() - begin
    for _ in range(STEPS_OF_A_BLOCK):
        take_step(engine)
    finish()
    disturbed = time.perf_counter() - begin
    shutil.rmtree(folder)
    step = undisturbed / STEPS_OF_A_BLOCK
    return copied / step, (disturbed - undisturbed) / step


def measure(engine: Engine, folder: Path, repetitions: int) -> dict[str, list[float]]:
    boxes = list(local_boxes(engine.optimizer, engine.chunks, engine.mesh))
    ours, torchs = Ours(folder / "ours", engine), TorchCheckpoint(folder / "torch", boxes)
    plain = PlainFile(folder / "plain", boxes)
    found: dict[str, list[float]] = {}

    def note(name: str, function: Callable[[], object]) -> None:
        found.setdefault(name, []).append(seconds(function))

    for _ in range(repetitions + 1):
        for name, contender in {"plain": plain, "megallm": ours, "torch": torchs}.items():
            note(f"{name} save", contender.save)
            drop_from_memory(contender.folder)
            note(f"{name} load", contender.load)
            if contender is plain:
                drop_from_memory(plain.folder)
                note("plain copy", plain.copy)
            shutil.rmtree(contender.folder)
    for repetition in range(4 * repetitions + 1):
        # Side by side, each as often the first as the second: the difference is smaller than what a disk does.
        pair = {"with checksums": ours.save, "without checksums": ours.save_without_checksums}
        for name in sorted(pair, reverse=bool(repetition % 2)):
            note(f"megallm save {name}", pair[name])
            shutil.rmtree(ours.folder)
    for name, saver in {"megallm": ours, "torch": torchs}.items():
        stalls = [stall_in_steps(engine, saver.start_saving, saver.folder) for _ in range(repetitions + 1)]
        found[f"{name} stall"] = [total for _, total in stalls]
        found[f"{name} stall by the copy"] = [by_copy for by_copy, _ in stalls]
    found["step"] = [seconds(lambda: take_step(engine)) for _ in range(STEPS_OF_A_BLOCK)]
    ours.close()
    # The first turn of each warms up.
    return {name: values[1:] for name, values in found.items()}


def of_range(values: list[float], digits: int = 3) -> dict[str, float]:
    median = statistics.median(values)
    return {
        "median": round(median, digits),
        "lowest": round(min(values), digits),
        "highest": round(max(values), digits),
    }


def summary(found: dict[str, list[float]], num_bytes: int) -> dict[str, object]:
    def gigabytes_per_second(name: str) -> dict[str, float]:
        return of_range([num_bytes / 1e9 / value for value in found[name]])

    def ratio(above: str, below: str) -> dict[str, float]:
        return of_range([b / a for a, b in zip(found[above], found[below], strict=True)])

    return {
        "gigabytes": round(num_bytes / 1e9, 3),
        "gigabytes_per_second": {
            name: gigabytes_per_second(name) for name in found if "stall" not in name and name != "step"
        },
        "speed_ratios": {
            "save to plain copy": ratio("megallm save", "plain copy"),
            "save to plain write": ratio("megallm save", "plain save"),
            "load to plain read": ratio("megallm load", "plain load"),
            "save to torch's": ratio("megallm save", "torch save"),
            "load to torch's": ratio("megallm load", "torch load"),
        },
        # Of the fastest saves: what a disk does meanwhile to others is many times more.
        "checksums_share_of_save": round(
            1 - min(found["megallm save without checksums"]) / min(found["megallm save with checksums"]), 3
        ),
        "seconds_of_a_step": of_range(found["step"]),
        "stall_in_steps": {name: of_range(values) for name, values in found.items() if "stall" in name},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of the model: 85 MB each")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write: on the disk that is measured")
    parser.add_argument("--output", type=Path, nargs="?", const=DEFAULT_OUTPUT, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    engine = make_engine(arguments.layers)
    num_bytes = sum(box.tensor.nbytes for box in content_of(engine, {})[0])
    with tempfile.TemporaryDirectory(dir=arguments.folder.resolve()) as folder:
        # torch saves in the background only where there is a process group.
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        figures = summary(measure(engine, Path(folder), arguments.repetitions), num_bytes)
        dist.destroy_process_group()
    record = {"machine": machine("torch", "safetensors", "xxhash"), "repetitions": arguments.repetitions} | figures
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    if arguments.output:
        write(arguments.output, record)


if __name__ == "__main__":
    main()
