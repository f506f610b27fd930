"""Tokens of samples: from the sequences that each of them crosses, read from the file and widened."""

import os

import numpy as np

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.native import functions as _native


def fetch_samples(
    dataset: IndexedDataset,
    document_index: np.ndarray,
    sample_index: np.ndarray,
    samples: np.ndarray,
    rows: np.ndarray,
    text: np.ndarray,
) -> tuple[np.ndarray, int, int]:
    """Fill rows of `text` with the tokens of samples.

    Always by plain reads, whether the dataset is mapped or not: a file that shrinks while it is in use ends a read
    early, where touching its map would end the process. A read of 8 kB out of the page cache takes no longer than
    widening what was read.

    Args:
        dataset: the sequences.
        document_index: int32 [m], sequences in the order in which they are read.
        sample_index: int32 or int64 [rows, 2], where each sample starts: position in `document_index`, token in that
            sequence.
        samples: int64 [n], which rows of `sample_index`.
        rows: int64 [n], the row of `text` that each of them goes to.
        text: int64 [rows, width]; what lies behind the last token of the last sequence stays as it is.

    Returns:
        how many tokens each sample has, int64 [n] (`width`, but for samples that run over the end); the lowest and the
        highest token of all of them.

    Raises:
        ValueError: an index leads outside of the sequences; the file has shrunk since it was opened, or cannot be read.
    """
    function = _native.fetch_samples if _native is not None else fetch_samples_reference
    dataset.check_size()
    try:
        return function(
            dataset.file_descriptor,
            dataset.dtype,
            dataset.sequence_lengths,
            dataset.sequence_offsets,
            document_index,
            sample_index,
            samples,
            rows,
            text,
        )
    except EOFError:
        dataset.check_size()
        raise ValueError(f"{dataset.bin_path} ended early while it was read: it was being changed.") from None
    except OSError as error:
        raise ValueError(f"{dataset.bin_path} cannot be read: {error.strerror}.") from None


def fetch_samples_reference(
    descriptor: int,
    dtype: np.dtype,
    sequence_lengths: np.ndarray,
    sequence_offsets: np.ndarray,
    document_index: np.ndarray,
    sample_index: np.ndarray,
    samples: np.ndarray,
    rows: np.ndarray,
    text: np.ndarray,
) -> tuple[np.ndarray, int, int]:
    """The native function in Python and numpy: the same arguments, results and errors."""
    filled = np.zeros(len(samples), np.int64)
    limits = np.iinfo(np.int64)
    lowest, highest = int(limits.max), int(limits.min)
    for number, (sample, row) in enumerate(zip(samples.tolist(), rows.tolist(), strict=True)):
        if not 0 <= row < len(text):
            raise ValueError(f"row {row} is not among {len(text)}")
        if not 0 <= sample < len(sample_index):
            raise ValueError(f"sample {sample} is not among {len(sample_index)}")
        position, offset = sample_index[sample].tolist()
        if position < 0 or offset < 0:
            raise ValueError("a sample starts at a negative place")
        while filled[number] < text.shape[1] and position < len(document_index):
            document = int(document_index[position])
            if not 0 <= document < len(sequence_lengths):
                raise ValueError(f"document {document} is not among {len(sequence_lengths)} sequences")
            length = int(sequence_lengths[document])
            if offset > length:
                raise ValueError(f"token {offset} is not within document {document} of {length} tokens")
            begin = int(filled[number])
            count = min(length - offset, text.shape[1] - begin)
            if count:
                start = int(sequence_offsets[document]) + offset * dtype.itemsize
                read = os.pread(descriptor, count * dtype.itemsize, start)
                if len(read) < count * dtype.itemsize:
                    raise EOFError("the file ends before a sample does")
                tokens = np.frombuffer(read, dtype)
                lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
                text[row, begin : begin + count] = tokens
                filled[number] += count
            position, offset = position + 1, 0
    return filled, lowest, highest


def mark_documents(
    text: np.ndarray,
    end: int,
    loss_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    document_ids: np.ndarray | None = None,
) -> None:
    """Fill in what follows from the ends of documents within samples.

    Args:
        text: int64 [n, L + 1]; all but the last token of a row are inputs.
        end: the token that ends a document, and belongs to it.
        loss_mask: float32 [n, L], set to 0 where the input is `end`, or None.
        position_ids: int64 [n, L], set to the place of each token within its document, or None.
        document_ids: int64 [n, L], set to the number of each token's document within its sample, or None.
    """
    function = _native.mark_documents if _native is not None else mark_documents_reference
    function(
        text,
        end,
        np.empty(0, np.float32) if loss_mask is None else loss_mask,
        np.empty(0, np.int64) if position_ids is None else position_ids,
        np.empty(0, np.int64) if document_ids is None else document_ids,
    )


def mark_documents_reference(
    text: np.ndarray, end: int, loss_mask: np.ndarray, position_ids: np.ndarray, document_ids: np.ndarray
) -> None:
    """The native function in numpy; what is not asked for is empty."""
    is_end = text[:, :-1] == end
    if loss_mask.size:
        loss_mask[is_end] = 0.0
    if document_ids.size:
        # A document's end belongs to it: the number rises behind it.
        document_ids[:] = np.cumsum(is_end, axis=1) - is_end
    if position_ids.size:
        starts = np.zeros(is_end.shape, np.int64)
        starts[:, 1:] = np.where(is_end[:, :-1], np.arange(1, is_end.shape[1]), 0)
        position_ids[:] = np.arange(is_end.shape[1]) - np.maximum.accumulate(starts, axis=1)
