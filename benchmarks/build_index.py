"""Tokens whose indices are built in a second: the compiled loops against the same in numpy, in one run.

    python benchmarks/build_index.py [--billions 10] [--output [FILE]]

The lengths of as many documents as make that many tokens are drawn at random (geometric, of mean 1,000 and of 100); the
tokens themselves are not needed. Samples have 4,096 tokens and the one that follows. What is timed, on the clock, with
one thread: the sample index alone; all three indices of one pass (two shuffles and the sample index); the same by
numpy, and both must be equal; the cache, from building to the checked entry on the disk, and finding it again; and a
blend of ten datasets, of ten million samples. Contenders take turns; the median of the repetitions stands.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from record import RESULTS, machine, write

from megallm.data.samples import helpers, reference
from megallm.data.samples.index_cache import load_or_build
from megallm.data.samples.order import build_sample_order

SEQUENCE_LENGTH = 4096
MEAN_DOCUMENTS = (1000, 100)
BLEND_SIZE, BLENDED, BLEND_SIZE_NUMPY = 10_000_000, 10, 100_000
DEFAULT_OUTPUT = RESULTS / "build_index.json"


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def all_indices(lengths: np.ndarray) -> dict[str, np.ndarray]:
    return build_sample_order(lengths, 0, len(lengths), SEQUENCE_LENGTH, None, seed=1234)


def by_numpy(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """`all_indices` without the compiled loops."""
    with mock.patch.object(helpers, "_native", None):
        return all_indices(lengths)


def sample_index_alone(lengths: np.ndarray) -> Callable[[], object]:
    documents = np.random.default_rng(1).permutation(len(lengths)).astype(np.int32)
    num_samples = (int(lengths.sum(dtype=np.int64)) - 1) // SEQUENCE_LENGTH
    return lambda: helpers.build_sample_index(lengths, documents, SEQUENCE_LENGTH, num_samples)


def measure(num_tokens: int, mean: int, repetitions: int) -> dict[str, object]:
    lengths = np.random.default_rng(2).geometric(1 / mean, num_tokens // mean).astype(np.int32)
    ours, theirs = all_indices(lengths), by_numpy(lengths)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs), "compiled and numpy's indices differ"
    del ours, theirs
    tokens = int(lengths.sum(dtype=np.int64))
    alone = sample_index_alone(lengths)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def through_cache(number: int) -> object:
            return load_or_build(Path(folder), f"key{number}", lambda: all_indices(lengths))

        for number in range(repetitions):
            contenders = {
                "sample index alone": alone,
                "all three indices": lambda: all_indices(lengths),
                "all three by numpy": lambda: by_numpy(lengths),
                "all three, built and stored": lambda number=number: through_cache(number),
                "all three, found": lambda number=number: through_cache(number),
            }
            for name, work in contenders.items():
                times.setdefault(name, []).append(tokens / seconds(work) / 1e9)
    result: dict[str, object] = {
        "documents": len(lengths),
        "billion_tokens": round(tokens / 1e9, 3),
        "billion_tokens_per_second": {name: round(statistics.median(rates), 2) for name, rates in times.items()},
        "lowest": {name: round(min(rates), 2) for name, rates in times.items()},
    }
    pairs = zip(times["all three indices"], times["all three by numpy"], strict=True)
    result["times_numpy"] = round(statistics.median(ours / numpy for ours, numpy in pairs), 1)
    return result


def measure_blend(repetitions: int) -> dict[str, object]:
    """Samples of a blend dealt in a second."""
    weights = np.random.default_rng(3).dirichlet(np.ones(BLENDED))
    ours, theirs = (
        [size / seconds(lambda build=build, size=size: build(weights, size)) for _ in range(repetitions)]
        for build, size in (
            (helpers.build_blending_indices, BLEND_SIZE),
            (reference.build_blending_indices, BLEND_SIZE_NUMPY),
        )
    )
    return {
        "datasets": BLENDED,
        "million_samples_per_second": round(statistics.median(ours) / 1e6, 2),
        "times_numpy": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--billions", type=float, default=10, help="billions of tokens (10)")
    parser.add_argument("--repetitions", type=int, default=5, help="(5)")
    parser.add_argument("--output", nargs="?", const=DEFAULT_OUTPUT, type=Path, help=f"default {DEFAULT_OUTPUT}")
    options = parser.parse_args()
    if not helpers.is_native():
        parser.exit(2, "the compiled loops are not built: make install builds them\n")
    report: dict[str, object] = {
        "machine": machine("numpy"),
        "tokens_of_a_sample": SEQUENCE_LENGTH + 1,
    }
    for mean in MEAN_DOCUMENTS:
        report[f"documents of {mean} tokens"] = measure(int(options.billions * 1e9), mean, options.repetitions)
    report["blend"] = measure_blend(options.repetitions)
    print(json.dumps(report, indent=2))
    if options.output:
        write(options.output, report)


if __name__ == "__main__":
    main()
