"""Tokens of samples: from the sequences that each of them crosses, read from the file and widened."""

import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.native import functions as _native


class Reader(Protocol):
    """`SampleReader`, or the compiled class of that name."""

    def fetch(
        self, indices: np.ndarray, places: np.ndarray, text: np.ndarray, padding: int
    ) -> tuple[int, int, int]: ...


def sample_reader(
    dataset: IndexedDataset, document_index: np.ndarray, sample_index: np.ndarray, shuffle_index: np.ndarray
) -> Reader:
    """What reads the samples of a dataset as long as it is open, compiled where that was built.

    Always by plain reads, whether the dataset is mapped or not: a file that shrinks while it is in use ends a read
    early, where touching its map would end the process. A read of 8 kB out of the page cache takes no longer than
    widening what was read.

    Args:
        dataset: the sequences.
        document_index, sample_index, shuffle_index: as `build_sample_order` makes them.

    Raises:
        ValueError: the arrays are of other forms.
    """
    return (SampleReader if _native is None else _native.SampleReader)(
        dataset.file_descriptor,
        dataset.dtype,
        dataset.sequence_lengths,
        dataset.sequence_offsets,
        document_index,
        sample_index,
        shuffle_index,
        dataset.sizes_at_opening(),
    )


def fetch_samples(
    dataset: IndexedDataset, reader: Reader, indices: np.ndarray, places: np.ndarray, text: np.ndarray, padding: int
) -> tuple[int, int, int]:
    """`SampleReader.fetch` with errors that name the file.

    Raises:
        IndexError: there is no such sample.
        ValueError: an index leads outside of the sequences; the file has shrunk since it was opened, or cannot be read.
    """
    try:
        return reader.fetch(indices, places, text, padding)
    except EOFError:
        dataset.check_size()
        raise ValueError(f"{dataset.bin_path} ended early while it was read: it was being changed.") from None
    except OSError as error:
        raise ValueError(f"{dataset.bin_path} cannot be read: {error.strerror}.") from None
    except IndexError as error:
        raise IndexError(f"{dataset.path_prefix}: {error}.") from None


class SampleReader:
    """Reads samples, in Python and numpy: the compiled class has the same arguments, results and errors.

    Args:
        descriptor: of the file of tokens.
        dtype: of the tokens.
        sequence_lengths: int32 [sequences], in tokens.
        sequence_offsets: int64 [sequences], in bytes.
        document_index: int32 [m], sequences in the order in which they are read.
        sample_index: int32 or int64 [rows, 2], where each sample starts: position in `document_index`, token in that
            sequence.
        shuffle_index: uint32 or int64 [samples], rows of `sample_index` in the order in which they are read.
        files: descriptors and sizes in bytes of files which must not have become shorter when samples are read.
    """

    def __init__(
        self,
        descriptor: int,
        dtype: np.dtype,
        sequence_lengths: np.ndarray,
        sequence_offsets: np.ndarray,
        document_index: np.ndarray,
        sample_index: np.ndarray,
        shuffle_index: np.ndarray,
        files: list[tuple[int, int]],
    ) -> None:
        self._descriptor, self._dtype, self._files = descriptor, dtype, files
        self._lengths, self._offsets, self._documents = sequence_lengths, sequence_offsets, document_index
        self._starts, self._order = sample_index, shuffle_index

    def fetch(self, indices: np.ndarray, places: np.ndarray, text: np.ndarray, padding: int) -> tuple[int, int, int]:
        """Fill rows of `text` with the tokens of samples.

        Args:
            indices: int64 [n], samples by their place in the shuffled order.
            places: int64 [n], the row of `text` that each of them goes to.
            text: int64 [rows, width].
            padding: what is put behind the last token of the last sequence, where a sample runs over the end.

        Returns:
            the lowest and the highest token that was read; how many places got `padding`.

        Raises:
            IndexError, ValueError: there is no such sample; an index leads outside of the sequences.
            EOFError, OSError: a file has shrunk; it cannot be read.
        """
        if any(os.fstat(descriptor).st_size < size for descriptor, size in self._files):
            raise EOFError("a file ends before a sample does")
        limits = np.iinfo(np.int64)
        lowest, highest, missing = int(limits.max), int(limits.min), 0
        for index, place in zip(indices.tolist(), places.tolist(), strict=True):
            if not 0 <= index < len(self._order):
                raise IndexError(f"there are samples 0 to {len(self._order) - 1}, not {index}")
            if not 0 <= place < len(text):
                raise ValueError(f"row {place} is not among {len(text)}")
            filled = 0
            for tokens in self._pieces(int(self._order[index]), text.shape[1]):
                lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
                text[place, filled : filled + len(tokens)] = tokens
                filled += len(tokens)
            text[place, filled:] = padding
            missing += text.shape[1] - filled
        return lowest, highest, missing

    def _pieces(self, sample: int, width: int) -> Iterator[np.ndarray]:
        """The tokens of a sample, from one sequence after another."""
        if not 0 <= sample < len(self._starts):
            raise ValueError(f"sample {sample} is not among {len(self._starts)}")
        position, offset = self._starts[sample].tolist()
        if position < 0 or offset < 0:
            raise ValueError("a sample starts at a negative place")
        while width > 0 and position < len(self._documents):
            document = int(self._documents[position])
            if not 0 <= document < len(self._lengths):
                raise ValueError(f"document {document} is not among {len(self._lengths)} sequences")
            length = int(self._lengths[document])
            if offset > length:
                raise ValueError(f"token {offset} is not within document {document} of {length} tokens")
            count = min(length - offset, width)
            if count:
                size = self._dtype.itemsize
                read = os.pread(self._descriptor, count * size, int(self._offsets[document]) + offset * size)
                if len(read) < count * size:
                    raise EOFError("a file ends before a sample does")
                yield np.frombuffer(read, self._dtype)
            width, position, offset = width - count, position + 1, 0


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
