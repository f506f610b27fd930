"""Order in which samples are cut from documents: Megatron's three indices."""

from dataclasses import dataclass

import numpy as np

from megallm.data.samples import helpers

# A last epoch of which less than this share is used is shuffled apart from the others, so that they are all seen whole
# before it.
SEPARATE_EPOCH_THRESHOLD = 0.80


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are read for a number of samples.

    Attributes: `num_epochs`; `num_samples` in all epochs together, the partial one at the end included if it is
    kept; `num_samples_before_last`, those that are shuffled apart from the last epoch's, or None when all are shuffled
    together.
    """

    num_epochs: int
    num_samples: int
    num_samples_before_last: int | None


def plan_epochs(
    num_tokens: int, sequence_length: int, num_samples: int | None, keep_partial: bool = False
) -> EpochPlan:
    """The smallest number of epochs of `num_tokens` that gives `num_samples` (one epoch for None).

    Each sample takes `sequence_length` tokens, and the last one needs one token more, for its last label. With
    `keep_partial` what is left over is one sample more, which is shorter. (Megatron rounds up in float32 there, and so
    counts one sample too many or too few from some 16 million tokens on; this is exact.)
    """
    assert num_tokens > 0, "a dataset without tokens has no epochs"
    wanted = 0 if num_samples is None else num_samples * sequence_length + 1
    num_epochs = max(1, -(-wanted // num_tokens))
    predicted = num_epochs * num_tokens - 1
    total = -(-predicted // sequence_length) if keep_partial else predicted // sequence_length
    if num_epochs == 1 or num_samples is None:
        return EpochPlan(1, total, None)
    before_last = ((num_epochs - 1) * num_tokens - 1) // sequence_length
    per_epoch = (num_tokens - 1) // sequence_length
    from_last = num_samples - before_last
    assert 0 <= from_last <= per_epoch + 1, "the number of epochs is not the smallest one"
    is_separate = from_last < int(SEPARATE_EPOCH_THRESHOLD * per_epoch)
    return EpochPlan(num_epochs, total, before_last if is_separate else None)


def build_sample_order(
    sequence_lengths: np.ndarray,
    first: int,
    last: int,
    sequence_length: int,
    num_samples: int | None,
    seed: int,
    keep_partial: bool = False,
) -> dict[str, np.ndarray]:
    """Megatron's three indices over sequences `first` to `last - 1`.

    Returns:
        `document_index` int32 [epochs * (last - first)], the sequences in the order in which they are read;
        `sample_index` [samples + 1, 2], where each sample starts (see `helpers.build_sample_index`); `shuffle_index`
        uint32 or int64 [samples], the order of the samples. With `keep_partial` the last row of `sample_index` is the
        last token there is.
    """
    num_tokens = int(sequence_lengths[first:last].sum(dtype=np.int64))
    plan = plan_epochs(num_tokens, sequence_length, num_samples, keep_partial)
    # Up to four shuffles draw from one generator, whose stream numpy has frozen; their order fixes the result.
    generator = np.random.RandomState(seed)
    documents = np.arange(first, last, dtype=np.int32)
    separate = plan.num_samples_before_last is not None
    document_index = np.tile(documents, plan.num_epochs - separate)
    helpers.shuffle(generator, document_index)
    if separate:
        helpers.shuffle(generator, documents)
        document_index = np.concatenate([document_index, documents])
    wide = len(document_index) > np.iinfo(np.int32).max
    num_whole = (plan.num_epochs * num_tokens - 1) // sequence_length
    sample_index = helpers.build_sample_index(sequence_lengths, document_index, sequence_length, num_whole, wide)
    if plan.num_samples > num_whole:
        end = [len(document_index) - 1, sequence_lengths[document_index[-1]] - 1]
        sample_index = np.concatenate([sample_index, np.array([end], sample_index.dtype)])

    dtype = np.int64 if plan.num_samples >= np.iinfo(np.uint32).max - 1 else np.uint32
    boundary = plan.num_samples if plan.num_samples_before_last is None else plan.num_samples_before_last
    shuffle_index = np.arange(plan.num_samples, dtype=dtype)
    # Slices of one array are shuffled in place, with the draws that arrays of their own would take.
    helpers.shuffle(generator, shuffle_index[:boundary])
    if separate:
        helpers.shuffle(generator, shuffle_index[boundary:])
    return {"document_index": document_index, "sample_index": sample_index, "shuffle_index": shuffle_index}
