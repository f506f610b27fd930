"""Whether the data of a run is still what it was: a digest of what its files hold, not of what they are called."""

import hashlib
from collections.abc import Iterable

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.index_cache import content_hash

# Tokens are read from so many places of all datasets together, two of each dataset at least: the whole of them would
# take as long as reading the disk.
PLACES = 64
TOKENS_AT_A_PLACE = 2048


def content_digest(datasets: Iterable[IndexedDataset], count: int) -> str:
    """A digest of what datasets hold: the lengths of all their sequences, and their tokens at some fixed places.

    Documents that are added, removed, put into another order or made with another tokenizer change it; a few tokens
    that are written over in large files may not.

    Args:
        datasets: read one after another.
        count: how many there are.

    Raises:
        ValueError: a file has shrunk since it was opened, or cannot be read.
    """
    places = max(2, PLACES // max(1, count))
    digest = hashlib.blake2b(digest_size=8)
    for dataset in datasets:
        lengths = content_hash(dataset.idx_path, dataset.idx_status, "lengths", dataset.sequence_lengths)
        digest.update(f"{dataset.dtype.str} {lengths} ".encode())
        last = max(0, dataset.num_tokens - TOKENS_AT_A_PLACE)
        for start in dict.fromkeys(last * place // (places - 1) for place in range(places)):
            stop = min(start + TOKENS_AT_A_PLACE, dataset.num_tokens)
            digest.update(dataset.read_tokens(start, stop).data)
    return digest.hexdigest()
