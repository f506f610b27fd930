"""Micro-batches per second through the loader, against torch's DataLoader over the same samples, in one run.

    python benchmarks/data_feeding.py [--output benchmarks/results/data_feeding.json]

Both read the same GPT samples (4,097 tokens, from a file of 16-bit tokens in the page cache) in the same order, as four
micro-batches of four samples a step. torch's loader fetches sample by sample and stacks them with its default collate
function, one micro-batch at a time. CPU seconds are those of all processes. The `ratio` is torch's CPU time over
ours: above 1 ours is cheaper. The overhead is the loader's own time without workers: that of a step, less that of its
reads alone. The three measurements alternate, and the median of each counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import machine, write
from torch.utils.data import DataLoader

from megallm.config import resolve
from megallm.config.batch_sizes import BatchSizes
from megallm.config.dictionary import build
from megallm.data.feeding.loader import SampleSource, build_loader
from megallm.data.feeding.orders import DataShare, SingleOrder
from megallm.data.feeding.sampler import GlobalBatchSampler
from megallm.data.indexed.writer import IndexedDatasetWriter
from megallm.train.datasets import build_datasets

SEQUENCE_LENGTH, MICRO_BATCH, MICRO_BATCHES, ROUNDS = 4096, 4, 4, 5


def samples(folder: Path, num_samples: int) -> SampleSource:
    """A dataset of random documents with enough tokens for `num_samples`."""
    generator = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "text", np.dtype(np.uint16)) as writer:
        for _ in range(num_samples * SEQUENCE_LENGTH // 1000 + 100):
            writer.add_document(generator.integers(0, 50_000, int(generator.integers(500, 1500))))
        writer.finish()
    settings = {
        "model.vocab_size": 50_000,
        "model.num_attention_heads": 1,
        "data.data_path": [str(folder / "text")],
        "data.seq_length": SEQUENCE_LENGTH,
        "data.split": "1",
        "training.micro_batch_size": 1,
        "training.train_iters": num_samples,
        "optimizer.lr": 1.0,
    }
    return build_datasets(resolve(build(settings), 1), None).train


def ours(dataset: SampleSource, num_workers: int) -> Iterator[Any]:
    """Micro-batches of our loader."""
    share = DataShare(MICRO_BATCH)
    sizes = BatchSizes.constant(MICRO_BATCH * MICRO_BATCHES)
    sampler = GlobalBatchSampler(SingleOrder(len(dataset), share), 0, sizes, share)
    with closing(build_loader(dataset, sampler, num_workers)) as loader:
        for step in loader:
            yield from step


def torchs(dataset: SampleSource, num_workers: int) -> Iterator[Any]:
    """Micro-batches of torch's."""
    yield from DataLoader(dataset, batch_size=MICRO_BATCH, drop_last=True, num_workers=num_workers)  # type: ignore[arg-type]


def reads(dataset: SampleSource, num_workers: int) -> Iterator[Any]:
    """The reads of our loader and nothing else."""
    for start in range(0, len(dataset), MICRO_BATCH):
        yield dataset.get_batch(np.arange(start, start + MICRO_BATCH))


def measure(batches: Callable[[SampleSource, int], Iterator[Any]], dataset: SampleSource, num_workers: int) -> Any:
    """Seconds and CPU seconds of a micro-batch, the start of the workers left out of the former."""
    num = len(dataset) // (MICRO_BATCH * MICRO_BATCHES) * MICRO_BATCHES - MICRO_BATCHES
    cpu = cpu_seconds()
    with closing(batches(dataset, num_workers)) as iterator:  # type: ignore[type-var]
        kept = list(islice(iterator, MICRO_BATCHES))
        start = time.perf_counter()
        for _ in range(num // MICRO_BATCHES):
            # A step's micro-batches live until the next step's have come.
            kept = list(islice(iterator, MICRO_BATCHES))
        seconds = time.perf_counter() - start
    assert len(kept) == MICRO_BATCHES, "the data has ended early"
    return seconds / num, (cpu_seconds() - cpu) / (num + MICRO_BATCHES)


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def compare(dataset: SampleSource, num_workers: int) -> dict[str, Any]:
    """Medians over the rounds."""
    contenders = {"ours": ours, "torch": torchs} | ({} if num_workers else {"reads": reads})
    rounds = [
        {name: measure(batches, dataset, num_workers) for name, batches in contenders.items()} for _ in range(ROUNDS)
    ]

    def median(name: str, which: int) -> float:
        return statistics.median(one[name][which] for one in rounds)

    result: dict[str, Any] = {"workers": num_workers}
    for name in ("ours", "torch"):
        result[name] = {
            "micro_batches_per_second": round(1 / median(name, 0)),
            "micro_batches_per_cpu_second": round(1 / median(name, 1)),
        }
    result["ratio"] = round(median("torch", 1) / median("ours", 1), 2)
    if num_workers == 0:
        result["overhead_us"] = round(1e6 * statistics.median(one["ours"][1] - one["reads"][1] for one in rounds), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples(Path(folder), options.samples)
        results = [compare(dataset, num_workers) for num_workers in (0, 1, 2)]
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine("torch", "numpy"),
        "tokens_per_sample": SEQUENCE_LENGTH + 1,
        "samples_per_micro_batch": MICRO_BATCH,
        "results": results,
    }
    print(json.dumps(report, indent=2))
    if options.output:
        write(options.output, report)


if __name__ == "__main__":
    main()
