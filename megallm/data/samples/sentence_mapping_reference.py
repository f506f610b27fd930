"""`sentence_mapping.build_sentence_mapping` without compiled code: where none was built, and for tests that compare.

Arguments, results and errors are described there; `num_samples` is a number and `short_ratio` is worked out.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

# Documents with a longer sentence are left out.
LONGEST_SENTENCE = 512

# The 64-bit Mersenne Twister: M. Matsumoto and T. Nishimura, "Tables of 64-bit Mersenne Twisters" (2000), in the form
# that the C++ standard fixes as mt19937_64.
_SIZE, _HALF = 312, 156
_MATRIX = np.uint64(0xB5026F5AA96619E9)
_LOWER = np.uint64(0x7FFFFFFF)
_MULTIPLIER = 6364136223846793005


def mersenne_32(seed: int) -> Iterator[int]:
    """The numbers of C++'s `std::mt19937(seed)`."""
    bits = np.random.MT19937()
    # numpy's older way of seeding is the one of the standard.
    np.random.RandomState(bits).seed(seed)
    while True:
        yield from bits.random_raw(1024).tolist()


def mersenne_64(seed: int, count: int) -> np.ndarray:
    """The first `count` numbers of C++'s `std::mt19937_64(seed)`, uint64 [count]."""
    number, state = seed, []
    for position in range(1, _SIZE + 1):
        state.append(number)
        number = (_MULTIPLIER * (number ^ (number >> 62)) + position) % 2**64
    words = np.array(state, np.uint64)
    blocks = []
    for _ in range(-(-count // _SIZE)):
        # Each word takes its place from the next one and from the one half a state on, which in the second half are
        # new already.
        for part, far in ((slice(0, _HALF), slice(_HALF, _SIZE)), (slice(_HALF, _SIZE), slice(0, _HALF))):
            following = np.roll(words, -1)[part]
            mixed = (words[part] & ~_LOWER) | (following & _LOWER)
            words[part] = words[far] ^ (mixed >> np.uint64(1)) ^ np.where(mixed & np.uint64(1), _MATRIX, np.uint64(0))
        blocks.append(_temper(words))
    return np.concatenate(blocks)[:count] if blocks else np.empty(0, np.uint64)


def _temper(words: np.ndarray) -> np.ndarray:
    words = words ^ ((words >> np.uint64(29)) & np.uint64(0x5555555555555555))
    words = words ^ ((words << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000))
    words = words ^ ((words << np.uint64(37)) & np.uint64(0xFFF7EEE000000000))
    return words ^ (words >> np.uint64(43))


def build_sentence_mapping(
    document_bounds: np.ndarray,
    sentence_lengths: np.ndarray,
    num_samples: int,
    max_length: int,
    short_ratio: int,
    seed: int,
    min_sentences: int,
    wide: bool,
) -> np.ndarray:
    if max_length < 2 or short_ratio < 0:
        raise ValueError("max_length must be 2 at least and short_ratio not negative")
    documents = _usable_documents(document_bounds, sentence_lengths, min_sentences)
    numbers = mersenne_32(seed)

    def draw_target() -> int:
        if short_ratio == 0:
            return max_length
        number = next(numbers)
        return max_length if number % short_ratio else 2 + number % (max_length - 1)

    rows: list[tuple[int, int, int]] = []
    while len(rows) < num_samples and documents:
        for first, last in documents:
            start, tokens, target = first, 0, draw_target()
            for end, length in enumerate(sentence_lengths[first:last].tolist(), first + 1):
                tokens += length
                is_enough = tokens >= target and end - start >= min_sentences and last - end > 1
                if is_enough or end == last:
                    rows.append((start, end, target))
                    # Drawn behind the last sample of a document too, where nothing needs it.
                    start, tokens, target = end, 0, draw_target()
    return np.array(rows, np.int64 if wide else np.uint32).reshape(-1, 3)[_shuffle(len(rows), seed + 1)]


def _usable_documents(
    document_bounds: np.ndarray, sentence_lengths: np.ndarray, min_sentences: int
) -> list[tuple[int, int]]:
    """First sentence and the one behind the last of the documents that give samples."""
    usable = []
    for document, (first, last) in enumerate(pairwise(document_bounds.tolist())):
        if not 0 <= first <= last <= len(sentence_lengths):
            raise ValueError(
                f"document {document} has sentences {first} to {last}, which are not among {len(sentence_lengths)}"
            )
        count = last - first
        # A document of one sentence is kept however long it is: its sample is cut.
        is_long = count > 1 and sentence_lengths[first:last].max() > LONGEST_SENTENCE
        if count >= max(min_sentences, 1) and not is_long:
            usable.append((first, last))
    return usable


def _shuffle(count: int, seed: int) -> np.ndarray:
    """int64 [count], the rows in their order: each place from the last on swaps with one of those up to it."""
    order = list(range(count))
    places = np.arange(count - 1, 0, -1, dtype=np.uint64)
    chosen = mersenne_64(seed, len(places)) % (places + np.uint64(1))
    for place, other in zip(places.tolist(), chosen.tolist(), strict=True):
        order[place], order[other] = order[other], order[place]
    return np.array(order, np.int64)
