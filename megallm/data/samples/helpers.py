"""Loops that decide which tokens make a sample and which dataset a sample comes from.

Each function calls the compiled `megallm.data.samples._helpers` where it was built; `reference` holds the same ones in
numpy, with the same arguments and results. Token counts are 64-bit throughout.
"""

import numpy as np

from megallm.data.samples import reference
from megallm.data.samples.native import functions as _native


def is_native() -> bool:
    """Whether the compiled functions are used."""
    return _native is not None


def build_sample_index(
    sequence_lengths: np.ndarray, document_index: np.ndarray, sequence_length: int, num_samples: int, wide: bool = False
) -> np.ndarray:
    """Start of every sample in the stream of tokens that the documents form one after another.

    A sample takes `sequence_length` tokens and the one that follows, which is also the first token of the next sample.

    Args:
        sequence_lengths: int32 [sequences], tokens of each sequence.
        document_index: int32 [n], sequences in the order in which they are read; one may occur many times.
        sequence_length: tokens of a sample.
        num_samples: number of samples.
        wide: int64 results, for document indices too long for int32.

    Returns:
        int32 or int64 [num_samples + 1, 2]: position in `document_index`, token offset in that document. The last row
        is where a further sample would start.

    Raises:
        ValueError: the documents hold fewer than `num_samples * sequence_length + 1` tokens.
    """
    function = _native.build_sample_index if _native else reference.build_sample_index
    lengths, documents = (
        np.ascontiguousarray(sequence_lengths, np.int32),
        np.ascontiguousarray(document_index, np.int32),
    )
    return function(lengths, documents, sequence_length, num_samples, wide)


def build_blending_indices(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Order in which a blend draws from its datasets: at each step from the one that lags most behind its weight.

    The lag of a dataset before draw i is `weight * max(i, 1) - drawn` in doubles; the first of equal ones gives. A draw
    takes a time that grows with the logarithm of the number of datasets.

    Args:
        weights: float64 [datasets], summing to 1.
        size: number of samples of the blend.

    Returns:
        dataset of each sample, int16 [size] (int32 beyond 32,767 datasets), and its number within that dataset, int64
        [size].

    Raises:
        ValueError: there is no dataset, a weight is negative or not finite, or the size is negative.
    """
    function = _native.build_blending_indices if _native else reference.build_blending_indices
    return function(np.ascontiguousarray(weights, np.float64), size)


def build_exhaustive_blending_indices(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `build_blending_indices`, weighted by `sizes`, int64 [datasets], until every dataset is spent."""
    function = _native.build_exhaustive_blending_indices if _native else reference.build_exhaustive_blending_indices
    return function(np.ascontiguousarray(sizes, np.int64))


def shuffle(generator: np.random.RandomState, array: np.ndarray) -> None:
    """`generator.shuffle(array)`, with the same draws and the same result, about ten times as fast on long arrays.

    Other threads run meanwhile.

    Args:
        generator: its state moves on as numpy's own call would move it.
        array: [n], contiguous, of numbers; shuffled in place.
    """
    # Above 2**32 entries numpy takes draws of 64 bits; that long and other kinds of items are left to it.
    is_plain = array.dtype.kind in "iuf" and array.itemsize in (4, 8) and len(array) <= 2**32
    state = generator.get_state(legacy=False)
    assert isinstance(state, dict), "numpy gives the state of a generator as a dict unless asked for the old form"
    if _native is None or not is_plain or state["bit_generator"] != "MT19937":
        reference.shuffle(generator, array)
        return
    twister = state["state"]
    twister["pos"] = _native.shuffle(array, twister["key"], twister["pos"])
    generator.set_state(state)
