"""Which sentences make a sample of a masked language model, in exactly Megatron's order.

`build_sentence_mapping` calls the compiled `megallm.data.samples._helpers` where it was built, and otherwise
`sentence_mapping_reference`, which gives the same rows, slower.
"""

import math

import numpy as np

from megallm.data.samples import sentence_mapping_reference as reference
from megallm.data.samples.native import functions as _native


def is_native() -> bool:
    """Whether the compiled function is used."""
    return _native is not None


def short_ratio(probability: float) -> int:
    """The number r for which one sample in r is shorter: 1 / `probability`, halves rounded up; 0 for none."""
    if probability == 0:
        return 0
    # Beyond 2^32 it makes no difference: that is more than the generator's numbers.
    inverse = min(1.0 / probability, 2.0**62)
    return math.floor(inverse) + (inverse - math.floor(inverse) >= 0.5)


def build_sentence_mapping(
    document_bounds: np.ndarray,
    sentence_lengths: np.ndarray,
    num_samples: int | None,
    max_length: int,
    short_sequence_probability: float,
    seed: int,
    min_sentences: int,
    wide: bool | None = None,
) -> np.ndarray:
    """Cut documents into samples of whole sentences that are to have `max_length` tokens.

    Sentences are taken until they reach the target length, or the document ends; one sentence is never left over for
    the document's last sample. A sample in `1 / short_sequence_probability` has a random target length of 2 to
    `max_length`. A document with a sentence of more than 512 tokens is left out, unless it is its only one; so is one
    of fewer than `min_sentences` sentences. The rows of all epochs are shuffled together.

    Args:
        document_bounds: int64 [documents + 1], where each document's sentences start.
        sentence_lengths: int32 [sentences], in tokens.
        num_samples: rows wanted; the documents are read as many times over as that takes, each time to the end. None
            reads them once.
        max_length: tokens of a sample, 2 at least.
        short_sequence_probability: 0 to 1.
        seed: of the target lengths and, one higher, of the order; 0 to 2^32 - 1.
        min_sentences: sentences that a sample must have.
        wide: int64 rows; None where a sentence's number may not fit 32 bits.

    Returns:
        uint32 or int64 [rows, 3]: first sentence, the one behind the last, target length. No rows when no document can
        be used.

    Raises:
        ValueError: the bounds are not within the sentences, or `max_length` is below 2.
    """
    if wide is None:
        wide = len(sentence_lengths) > np.iinfo(np.uint32).max
    function = _native.build_sentence_mapping if _native else reference.build_sentence_mapping
    return function(
        np.ascontiguousarray(document_bounds, np.int64),
        np.ascontiguousarray(sentence_lengths, np.int32),
        1 if num_samples is None else num_samples,
        max_length,
        short_ratio(short_sequence_probability),
        seed,
        min_sentences,
        wide,
    )


def why_empty(document_bounds: np.ndarray, sentence_lengths: np.ndarray, min_sentences: int) -> str:
    """A sentence on why documents that gave no rows cannot be used."""
    sentences = np.diff(document_bounds)
    if len(sentences) == 0 or sentences.max() == 0:
        return f"its {len(sentences)} documents hold no sequences"
    if sentences.max() < min_sentences:
        return (
            f"each of its {len(sentences)} documents is one sequence, but {min_sentences} sentences are needed: "
            "preprocess the text with --split-sentences, so that each sentence is a sequence"
        )
    return (
        f"each of its {int((sentences >= max(1, min_sentences)).sum())} documents of {max(1, min_sentences)} sentences "
        f"or more has one of more than {reference.LONGEST_SENTENCE} tokens, which leaves the document out: split the "
        "text into shorter sentences"
    )
