"""The functions of `helpers` in numpy: for machines without the compiled ones, and for tests that compare the two.

Arguments, results and errors are described in `helpers`.
"""

import numpy as np


def build_sample_index(
    sequence_lengths: np.ndarray, document_index: np.ndarray, sequence_length: int, num_samples: int, wide: bool
) -> np.ndarray:
    if sequence_length < 1 or num_samples < 0:
        raise ValueError("sequence_length must be positive and num_samples not negative")
    if not wide and len(document_index) > np.iinfo(np.int32).max:
        raise ValueError(f"a document index of {len(document_index)} entries needs wide")
    if document_index.size and not 0 <= document_index.min() <= document_index.max() < len(sequence_lengths):
        raise ValueError(f"a document of the index is not among {len(sequence_lengths)} sequences")
    lengths = sequence_lengths[document_index]
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if num_samples and total < num_samples * sequence_length + 1:
        raise ValueError(
            f"the documents hold {total} tokens, too few for {num_samples} samples of {sequence_length} and 1 more"
        )
    tokens = np.arange(1, num_samples + 1, dtype=np.int64) * sequence_length
    positions = np.searchsorted(ends, tokens, side="right")
    result = np.zeros((num_samples + 1, 2), np.int64 if wide else np.int32)
    result[1:, 0] = positions
    result[1:, 1] = tokens - (ends[positions] - lengths[positions])
    return result


def _dataset_dtype(num_datasets: int) -> type[np.signedinteger]:
    return np.int16 if num_datasets <= np.iinfo(np.int16).max else np.int32


def build_blending_indices(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    if len(weights) < 1 or size < 0:
        raise ValueError("a blend needs one dataset at least and a size that is not negative")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("the weights of a blend must be finite and not negative")
    drawn = np.zeros(len(weights), np.int64)
    datasets, samples = np.empty(size, _dataset_dtype(len(weights))), np.empty(size, np.int64)
    for step in range(size):
        chosen = int(np.argmax(weights * max(step, 1) - drawn))
        datasets[step], samples[step] = chosen, drawn[chosen]
        drawn[chosen] += 1
    return datasets, samples


def build_exhaustive_blending_indices(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(sizes) < 1:
        raise ValueError("a blend needs one dataset at least")
    if sizes.min() < 0:
        raise ValueError("the sizes of a blend must not be negative")
    total = int(sizes.sum())
    weights = sizes / max(total, 1)
    drawn = np.zeros(len(sizes), np.int64)
    datasets, samples = np.empty(total, _dataset_dtype(len(sizes))), np.empty(total, np.int64)
    for step in range(total):
        chosen = int(np.argmax(np.where(drawn < sizes, weights * max(step, 1) - drawn, -np.inf)))
        datasets[step], samples[step] = chosen, drawn[chosen]
        drawn[chosen] += 1
    return datasets, samples


def shuffle(generator: np.random.RandomState, array: np.ndarray) -> None:
    generator.shuffle(array)
