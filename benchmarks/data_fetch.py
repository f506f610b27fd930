"""Samples fetched per CPU-second: GPTDataset, memory-mapped and by plain reads, against plain numpy on the same data.

    python benchmarks/data_fetch.py [--mean-document 1000] [--tokens 40000000] [--repetitions 5] [--output [FILE]]

Samples of 4,096 tokens and the one that follows are cut from documents of random lengths (geometric, of the given mean)
with ids below 32,000, stored as uint16, and read in their shuffled order from the page cache. What counts is the CPU
time of this one thread. The peer is what a careful programmer writes with numpy: the documents' pieces sliced from a
memory map, concatenated, widened, and the same five tensors built for each micro-batch. It gives the same arrays, which
is checked. Contenders take turns within one run; the median of the repetitions stands, with their range beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import RESULTS, machine, write

from megallm.data.indexed.format import token_dtype
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.writer import IndexedDatasetWriter
from megallm.data.samples import helpers
from megallm.data.samples.blended import BlendedDataset
from megallm.data.samples.gpt import GPTDataset, GPTDatasetSettings

SEQUENCE_LENGTH, VOCAB_SIZE, EOD = 4096, 32_000, 0
MICRO_BATCHES = (1, 4, 16)
BLENDED = 10
DEFAULT_OUTPUT = RESULTS / "data_fetch.json"
Read = Callable[[np.ndarray], dict[str, np.ndarray]]


def write_data(prefix: Path, num_tokens: int, mean_document: int) -> None:
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(prefix, token_dtype(VOCAB_SIZE)) as writer:
        for length in random.geometric(1 / mean_document, num_tokens // mean_document):
            writer.add_document(np.append(random.integers(1, VOCAB_SIZE, length - 1), EOD))


class PlainNumpy:
    """The same samples, as one writes them down with numpy and a memory map."""

    def __init__(self, prefix: Path, dataset: GPTDataset) -> None:
        self._tokens = np.memmap(f"{prefix}.bin", np.uint16, "r")
        indexed = IndexedDataset(prefix)
        self._lengths, self._offsets = np.array(indexed.sequence_lengths), np.array(indexed.sequence_offsets) // 2
        self._documents, self._starts, self._order = (
            np.array(array) for array in (dataset.document_index, dataset.sample_index, dataset.shuffle_index)
        )

    def text(self, index: int) -> np.ndarray:
        sample = self._order[index]
        (first, begin), (last, end) = self._starts[sample], self._starts[sample + 1]
        pieces = []
        for position in range(first, last + 1):
            document = self._documents[position]
            start, stop = self._offsets[document], self._offsets[document] + self._lengths[document]
            pieces.append(
                self._tokens[
                    start + begin if position == first else start : start + end + 1 if position == last else stop
                ]
            )
        return np.concatenate(pieces).astype(np.int64)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        text = np.stack([self.text(index) for index in indices.tolist()])
        if text.min() < 0 or text.max() >= VOCAB_SIZE:
            raise ValueError("a token is not below the vocabulary's size")
        shape = len(text), SEQUENCE_LENGTH
        return {
            "tokens": text[:, :-1],
            "labels": text[:, 1:],
            "loss_mask": np.ones(shape, np.float32),
            "position_ids": np.tile(np.arange(SEQUENCE_LENGTH), (len(text), 1)),
        }


def fetches_per_cpu_second(read: Read, num_samples: int, micro_batch: int) -> float:
    indices = np.arange(num_samples)
    begin = time.process_time()
    for first in range(0, num_samples - micro_batch + 1, micro_batch):
        read(indices[first : first + micro_batch])
    return num_samples // micro_batch * micro_batch / (time.process_time() - begin)


def contenders(prefix: Path) -> tuple[dict[str, Read], int]:
    settings = GPTDatasetSettings(SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE, eod_id=EOD)
    resets = GPTDatasetSettings(
        *(SEQUENCE_LENGTH, 1234, VOCAB_SIZE, EOD),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )

    def dataset(chosen: GPTDatasetSettings, *, mmap: bool) -> GPTDataset:
        indexed = IndexedDataset(prefix, mmap=mmap)
        return GPTDataset(indexed, 0, len(indexed), None, chosen)

    mapped = dataset(settings, mmap=True)
    plain_numpy = PlainNumpy(prefix, mapped)
    parts = [dataset(settings, mmap=True) for _ in range(BLENDED)]
    reads: dict[str, Read] = {
        "memory-mapped": mapped.get_batch,
        "plain reads": dataset(settings, mmap=False).get_batch,
        "with resets and end-of-document loss mask": dataset(resets, mmap=True).get_batch,
        f"blend of {BLENDED}": BlendedDataset(parts, [1.0] * BLENDED, len(mapped)).get_batch,
        "plain numpy": plain_numpy.read,
    }
    for first in range(0, len(mapped) - 4, 997):
        indices = np.arange(first, first + 4)
        wanted = plain_numpy.read(indices)
        for name in ("memory-mapped", "plain reads"):
            found = reads[name](indices)
            assert all(np.array_equal(found[field], wanted[field]) for field in wanted), f"{name} differs at {first}"
    return reads, len(mapped)


def measure(prefix: Path, repetitions: int) -> dict[str, object]:
    reads, num_samples = contenders(prefix)
    rounds: dict[tuple[str, int], list[float]] = {}
    for _ in range(repetitions + 1):
        for micro_batch in MICRO_BATCHES:
            for name, read in reads.items():
                rate = fetches_per_cpu_second(read, num_samples, micro_batch)
                rounds.setdefault((name, micro_batch), []).append(rate)
    results: dict[str, object] = {}
    for micro_batch in MICRO_BATCHES:
        # The first round warms the page cache and the memory of the process.
        rates = {name: rounds[name, micro_batch][1:] for name in reads}
        results[f"micro-batch of {micro_batch}"] = {
            name: {
                "fetches_per_cpu_second": round(statistics.median(of_name)),
                "lowest": round(min(of_name)),
                "highest": round(max(of_name)),
                "times_plain_numpy": round(
                    statistics.median(a / b for a, b in zip(of_name, rates["plain numpy"], strict=True)), 2
                ),
            }
            for name, of_name in rates.items()
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--mean-document", type=int, nargs="+", default=[1000, 100])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", nargs="?", const=DEFAULT_OUTPUT, type=Path, help=f"default {DEFAULT_OUTPUT}")
    options = parser.parse_args()
    report: dict[str, object] = {
        "machine": machine("numpy"),
        "native": helpers.is_native(),
        "tokens_of_a_sample": SEQUENCE_LENGTH + 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        for mean in options.mean_document:
            prefix = Path(folder) / f"documents{mean}"
            write_data(prefix, options.tokens, mean)
            report[f"documents of {mean} tokens"] = measure(prefix, options.repetitions)
    print(json.dumps(report, indent=2))
    if options.output:
        write(options.output, report)


if __name__ == "__main__":
    main()
