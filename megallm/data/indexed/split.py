"""One dataset as several, cut between documents."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise

from megallm.data.indexed.merge import check_output_is_no_input, commit_with_record
from megallm.data.indexed.output import DatasetOutput
from megallm.data.indexed.transfer import Piece, part_of, whole_dataset, write_pieces
from megallm.data.tokenizer.record import read_record


def counts_of_shares(num_documents: int, shares: Sequence[float]) -> list[int]:
    """Documents of each part, in proportion to the shares; cuts are rounded to whole documents.

    Raises:
        ValueError: a share is not above 0, or so small that its part has no document.
    """
    total = sum(shares)
    if not (shares and min(shares) > 0 and total < float("inf")):
        raise ValueError(f"Each share must be a number above 0, not {', '.join(f'{share:g}' for share in shares)}.")
    cuts = [round(num_documents * (share / total)) for share in accumulate(shares, initial=0.0)]
    counts = [end - start for start, end in pairwise(cuts)]
    if 0 in counts:
        wrong = counts.index(0)
        raise ValueError(
            f"Part {wrong} has a share of {shares[wrong]:g} in {total:g}, which is no whole document of "
            f"{num_documents}; {total / shares[wrong]:.0f} documents would give it one."
        )
    return counts


def split_dataset(
    path_prefix: str,
    output_prefixes: Sequence[str],
    counts: Callable[[int], Sequence[int]],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Piece]:
    """Write the documents of a dataset, in their order, to several new ones; never half of a document.

    All outputs are written before the first of them appears. Memory does not grow with the dataset. The record of the
    tokenizer goes beside each of them, without the counts, which are those of the whole.

    Args:
        path_prefix: path of the dataset without `.bin` or `.idx`.
        output_prefixes: those of the parts.
        counts: gives the documents of each part for the number of all documents; all of them in sum.
        progress: called with the number of bytes written since the last call.

    Returns:
        All documents of each part.

    Raises:
        ValueError: the dataset is broken, the counts do not sum to its documents, the disk is full.
    """
    whole = whole_dataset(path_prefix)
    numbers = counts(whole.num_documents)
    assert len(numbers) == len(output_prefixes), f"{len(numbers)} parts need as many outputs"
    if min(numbers) < 1 or sum(numbers) != whole.num_documents:
        raise ValueError(
            f"Parts of {', '.join(map(str, numbers))} documents are {sum(numbers)} in sum, each at least 1; "
            f"{path_prefix} has {whole.num_documents}."
        )
    record = read_record(path_prefix)
    if record is not None:
        record = {
            key: value
            for key, value in record.items()
            if key == "vocab_size" or not isinstance(value, int) or isinstance(value, bool)
        }
    for prefix in output_prefixes:
        check_output_is_no_input([path_prefix], prefix)
    with ExitStack() as stack:
        outputs = []
        first = 0
        for prefix, number in zip(output_prefixes, numbers, strict=True):
            output = DatasetOutput(prefix)
            stack.callback(output.discard)
            write_pieces(output, [part_of(whole, first, number)], progress)
            outputs.append(output)
            first += number
        for prefix, output in zip(output_prefixes, outputs, strict=True):
            commit_with_record(output, prefix, record)
    return [whole_dataset(prefix) for prefix in output_prefixes]
