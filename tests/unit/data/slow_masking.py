"""Masked samples worked out slowly, with lists alone and numpy's own shuffle and choice: what tests compare with."""

import math
from itertools import chain

import numpy as np
from hypothesis import strategies as st

from megallm.data.indexed.format import token_dtype
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.writer import IndexedDatasetWriter
from megallm.data.samples.masking import MaskingVocabulary

# Tokens from 45 on continue words.
VOCABULARY = MaskingVocabulary(
    60,
    cls_id=1,
    sep_id=2,
    mask_id=3,
    pad_id=0,
    bos_id=4,
    eos_id=5,
    sentinel_ids=(8, 9, 10, 11),
    continuation_ids=frozenset(range(45, 60)),
)
DOCUMENTS = [
    [[20, 45, 21, 22, 46, 47, 23], [24, 25, 48], [26, 27, 28, 29, 49, 30]],
    [[31, 32, 50, 33], [34, 35, 36, 51, 52, 37, 38]],
    [[39, 40, 41, 42, 53, 43, 44, 20, 54]],
]
# Documents of sentences of tokens; special tokens and empty sentences are rare, but there.
RANDOM_DOCUMENTS = st.lists(
    st.lists(st.lists(st.one_of(st.integers(12, 59), st.integers(0, 59)), max_size=25), max_size=7),
    min_size=1,
    max_size=6,
)


def write_sentences(prefix, documents):
    """An indexed dataset of one sequence a sentence."""
    with IndexedDatasetWriter(prefix, token_dtype(60)) as writer:
        for sentences in documents:
            writer.add_document(flat(sentences), [len(sentence) for sentence in sentences])
    return IndexedDataset(prefix)


def flat(lists):
    return list(chain.from_iterable(lists))


def mersenne(seed, bits):
    """The numbers of the Mersenne Twister of 32 or 64 bits, one by one, after the tables of the C++ standard."""
    if bits == 32:
        size, middle, low, matrix, multiplier = 624, 397, 31, 0x9908B0DF, 1812433253
        steps = [(11, 2**32 - 1, -1), (7, 0x9D2C5680, 1), (15, 0xEFC60000, 1), (18, 2**32 - 1, -1)]
    else:
        size, middle, low, matrix, multiplier = 312, 156, 31, 0xB5026F5AA96619E9, 6364136223846793005
        steps = [(29, 0x5555555555555555, -1), (17, 0x71D67FFFEDA60000, 1), (37, 0xFFF7EEE000000000, 1), (43, ~0, -1)]
    state = [seed % 2**bits]
    for position in range(1, size):
        state.append((multiplier * (state[-1] ^ (state[-1] >> (bits - 2))) + position) % 2**bits)
    position = 0
    while True:
        following = state[(position + 1) % size]
        joined = (state[position] >> low << low) | (following % 2**low)
        state[position] = state[(position + middle) % size] ^ (joined >> 1) ^ (matrix if joined % 2 else 0)
        number = state[position]
        for shift, mask, direction in steps:
            number ^= (number << shift if direction > 0 else number >> shift) & mask
        yield number % 2**bits
        position = (position + 1) % size


def sentence_rows(documents, num_samples, max_length, probability, seed, min_sentences):
    """Rows of the mapping in their shuffled order; `documents` are lists of lengths, one after another."""
    ratio = 0 if probability == 0 else math.floor(1 / probability + 0.5)
    numbers = mersenne(seed, 32)

    def target():
        number = next(numbers) if ratio else 1
        return 2 + number % (max_length - 1) if ratio and number % ratio == 0 else max_length

    rows, before = [], -1
    while len(rows) < (num_samples or 1) and len(rows) > before:
        before, start = len(rows), 0
        for lengths in documents:
            if len(lengths) >= max(1, min_sentences) and (len(lengths) == 1 or max(lengths) <= 512):
                wanted, begin = target(), 0
                for end in range(1, len(lengths) + 1):
                    left = len(lengths) - end
                    full = sum(lengths[begin:end]) >= wanted and end - begin >= min_sentences and left > 1
                    if full or left == 0:
                        rows.append([start + begin, start + end, wanted])
                        begin, wanted = end, target()
            start += len(lengths)
    numbers = mersenne(seed + 1, 64)
    for last in range(len(rows) - 1, 0, -1):
        other = next(numbers) % (last + 1)
        rows[last], rows[other] = rows[other], rows[last]
    return rows


def runs(tokens, vocabulary, target, generator, probability, max_words, geometric, on_token=None):
    """The masked runs in the order in which they are drawn; `on_token` is called for each token of them."""
    words = []
    for position, token in enumerate(tokens):
        if token in (vocabulary.cls_id, vocabulary.sep_id):
            continue
        if token in vocabulary.continuation_ids and words:
            words[-1].append(position)
        else:
            words.append([position])
    limit = min(probability * target, max(1, round(len(tokens) * probability)))
    counts = np.arange(1, max_words + 1)
    chances = 1 / counts
    chances /= chances.sum()
    candidates = [[flat(words[first : first + n]) for n in counts] for first in range(len(words))]
    generator.shuffle(candidates)
    found, masked = [], set()
    for candidate in candidates:
        if len(masked) >= limit:
            break
        if geometric:
            n = min(generator.geometric(0.2), max_words)
        else:
            n = generator.choice(counts, p=chances / chances.sum())
        fitting = [run for run in candidate[:n] if len(masked) + len(run) <= limit]
        if not fitting or masked & set(fitting[-1]):
            continue
        for position in fitting[-1]:
            masked.add(position)
            if on_token:
                on_token(position)
        found.append(fitting[-1])
    return found


def bert_sample(sentences, target, index, settings):
    """An item of `BERTDataset` in lists."""
    vocabulary, length = settings.vocabulary, settings.sequence_length
    generator = np.random.RandomState((settings.seed + index) % 2**32)
    pivot, swapped = len(sentences), False
    if settings.next_sentence:
        pivot = generator.randint(1, len(sentences)) if len(sentences) > 2 else 1
        swapped = generator.random() < 0.5
    texts = [flat(sentences[:pivot]), flat(sentences[pivot:])]
    if swapped:
        texts.reverse()
    truncated = False
    while len(texts[0]) + len(texts[1]) > target:
        truncated = True
        longer = texts[0] if len(texts[0]) > len(texts[1]) else texts[1]
        longer.pop(0 if generator.random() < 0.5 else -1)
    tokens = [vocabulary.cls_id, *texts[0], vocabulary.sep_id]
    types = [0] * len(tokens)
    if texts[1]:
        tokens += [*texts[1], vocabulary.sep_id]
        types += [1] * (len(texts[1]) + 1)
    text, labels = list(tokens), [-1] * length

    def replace(position):
        labels[position] = tokens[position]
        if generator.random() < 0.8:
            text[position] = vocabulary.mask_id
        elif generator.random() >= 0.5:
            text[position] = generator.randint(vocabulary.vocab_size)

    runs(tokens, vocabulary, target, generator, settings.masking_probability, 3, False, replace)
    rest = length - len(tokens)
    return {
        "tokens": text + [vocabulary.pad_id] * rest,
        "types": types + [0] * rest,
        "labels": labels,
        "is_random": int(swapped),
        "padding_mask": [1] * len(tokens) + [0] * rest,
        "loss_mask": [int(label >= 0) for label in labels],
        "truncated": int(truncated),
    }


def t5_sample(sentences, target, index, settings):
    """An item of `T5Dataset` in lists."""
    vocabulary, length, decoder_length = settings.vocabulary, settings.sequence_length, settings.decoder_sequence_length
    generator = np.random.RandomState((settings.seed + index) % 2**32)
    whole = flat(sentences)
    tokens = whole[:target]
    found = runs(tokens, vocabulary, target, generator, settings.masking_probability, 10, True)
    encoder, decoder, begin = [], [], 0
    for sentinel, run in zip(vocabulary.sentinel_ids, sorted(found), strict=False):
        encoder += [*tokens[begin : run[0]], sentinel]
        decoder += [sentinel, *(tokens[position] for position in run)]
        begin = run[-1] + 1
    encoder += tokens[begin:]
    rest, decoder_rest = length - len(encoder), decoder_length - len(decoder) - 1
    return {
        "text_enc": encoder + [vocabulary.pad_id] * rest,
        "text_dec": [vocabulary.bos_id, *decoder] + [vocabulary.pad_id] * decoder_rest,
        "labels": [*decoder, vocabulary.eos_id] + [-1] * decoder_rest,
        "loss_mask": [1] * (len(decoder) + 1) + [0] * decoder_rest,
        "truncated": int(len(whole) > target),
        "enc_mask": [1] * len(encoder) + [0] * rest,
        "dec_mask": [1] * (len(decoder) + 1) + [0] * decoder_rest,
    }
