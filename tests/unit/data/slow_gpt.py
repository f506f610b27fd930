"""Megatron's GPT samples once more, from the description of its rules alone: lists, exact fractions, one token a time.

Only the shuffles are numpy's, whose generator the rules name.
"""

import math
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np


def split_bounds(split):
    """Three pairs of bounds from a text such as "949,50,1"; None for a split of no width."""
    shares = [float(word) for word in re.findall(r"[.0-9]+", split)]
    shares = (shares + [0.0, 0.0])[:3]
    total = shares[0] + shares[1] + shares[2]
    bounds, reached = [], 0.0
    for share in shares:
        following = reached + share / total
        bounds.append((reached, following) if reached < following else None)
        reached = following
    return bounds


def shuffled(random, values):
    array = np.array(list(values), np.int64)
    random.shuffle(array)
    return array.tolist()


def sample_order(lengths, first, last, length, num_samples, seed, keep_partial):
    """Documents in the order in which they are read, number of samples, and the order of those."""
    total = sum(lengths[first:last])
    epochs = 1
    while num_samples is not None and epochs * total < num_samples * length + 1:
        epochs += 1
    exact = Fraction(epochs * total - 1, length)
    count = math.ceil(exact) if keep_partial else math.floor(exact)
    random = np.random.RandomState(seed)
    before = ((epochs - 1) * total - 1) // length
    if epochs > 1 and num_samples - before < int(0.80 * ((total - 1) // length)):
        documents = shuffled(random, list(range(first, last)) * (epochs - 1)) + shuffled(random, range(first, last))
        return documents, shuffled(random, range(before)) + shuffled(random, range(before, count))
    documents = shuffled(random, list(range(first, last)) * epochs)
    return documents, shuffled(random, range(count))


def samples(documents, bounds, length, num_samples, seed, keep_partial=False, pad=-1):
    """All samples of a split of one dataset, each `length` tokens and the one that follows."""
    first, last = round(bounds[0] * len(documents)), round(bounds[1] * len(documents))
    lengths = [len(document) for document in documents]
    order, places = sample_order(lengths, first, last, length, num_samples, seed, keep_partial)
    stream = [token for number in order for token in documents[number]]
    texts = [stream[place * length : place * length + length + 1] for place in places]
    return [text + [pad] * (length + 1 - len(text)) for text in texts]


def blend(datasets, weights, size):
    """(dataset, sample) of each draw: by weights up to a size, or, with a size of None, each dataset to its end."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    drawn, draws = [0] * len(weights), []
    while len(draws) < (sum(map(len, datasets)) if size is None else size):
        best = None
        for number, share in enumerate(shares):
            if size is None and drawn[number] == len(datasets[number]):
                continue
            lag = share * max(len(draws), 1) - drawn[number]
            if best is None or lag > best[0]:
                best = lag, number
        draws.append((best[1], drawn[best[1]]))
        drawn[best[1]] += 1
    return draws


def blended_samples(corpora, weights, bounds, length, num_samples, seed, keep_partial=False, pad=-1):
    """The (dataset, text) of every sample of one split of a blend."""
    if weights is None:
        datasets = [samples(corpus, bounds, length, None, seed, keep_partial, pad) for corpus in corpora]
        sizes = [len(dataset) for dataset in datasets]
        draws = blend(datasets, sizes, None if num_samples is None else min(num_samples, sum(sizes)))
    else:
        shares = [weight / sum(weights) for weight in weights]
        wanted = [math.ceil(num_samples * share) for share in shares]
        datasets = [
            samples(corpus, bounds, length, math.ceil(count * (1 + 0.005)), seed, keep_partial, pad)
            for corpus, count in zip(corpora, wanted, strict=True)
        ]
        draws = blend(datasets, weights, sum(wanted))
    return [(number, datasets[number][sample]) for number, sample in draws]


def item(text, pad, eod, *, reset_position_ids, reset_attention_mask, eod_mask_loss):
    """The tensors of a sample, token by token."""
    fields = {"tokens": [], "labels": [], "loss_mask": [], "position_ids": [], "may_look": []}
    start = 0
    for place, (token, label) in enumerate(pairwise(text)):
        fields["tokens"].append(0 if token == pad else token)
        fields["labels"].append(0 if label == pad else label)
        fields["loss_mask"].append(0.0 if label == pad or (eod_mask_loss and token == eod) else 1.0)
        fields["position_ids"].append(place - (start if reset_position_ids else 0))
        fields["may_look"].append(
            [(start if reset_attention_mask else 0) <= other <= place for other in range(len(text) - 1)]
        )
        if token == eod:
            start = place + 1
    return fields
