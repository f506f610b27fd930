"""Text files to token files: read, tokenize in several processes, write in order."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from megallm.data.indexed.format import token_dtype
from megallm.data.indexed.writer import IndexedDatasetWriter
from megallm.data.text.documents import RawDocument, read_documents, texts_of
from megallm.data.tokenizer.base import Tokenizer, TokenizerSettings
from megallm.data.tokenizer.build import build_tokenizer

# A batch is handed to a worker when it reaches one of these: enough to hide the cost of handing over, small in memory.
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024
# Batches that each worker may have waiting, being worked on, or done and not yet written.
BATCHES_PER_WORKER = 3


@dataclass(frozen=True)
class Encoder:
    """Turns batches of documents into tokens: the same in every process that it is sent to.

    Attributes: `settings` of the tokenizer; `keys` of the JSON objects whose texts are tokenized; `append_eod`, whether
    the token that ends documents is added.
    """

    settings: TokenizerSettings
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The dtype that the tokens are stored in."""
        return token_dtype(_tokenizer(self).vocab_size)

    def __call__(self, batch: list[RawDocument]) -> list["Encoded"]:
        """Tokens of a batch, for each key.

        A text without tokens makes no sequence; a document without any gets no end-of-document token.

        Raises:
            ValueError: a document is broken; names file and line.
        """
        texts = [texts_of(document, self.keys) for document in batch]
        return [self._encode(batch, [parts[number] for parts in texts]) for number in range(len(self.keys))]

    def _encode(self, batch: list[RawDocument], texts: list[list[str]]) -> "Encoded":
        """Tokens of a batch, given the texts of each document under one key."""
        tokenizer = _tokenizer(self)
        try:
            ids = iter(tokenizer.encode_batch([text for parts in texts for text in parts]))
        except ValueError:
            # One after another, to find the document that the message must name.
            for document, parts in zip(batch, texts, strict=True):
                for text in parts:
                    _encode_one(document, text, tokenizer)
            raise
        tokens: list[int] = []
        sequence_lengths: list[int] = []
        sequences: list[int] = []
        for parts in texts:
            before = len(sequence_lengths)
            for part in islice(ids, len(parts)):
                if part:
                    tokens += part
                    sequence_lengths.append(len(part))
            if self.append_eod and len(sequence_lengths) > before:
                tokens.append(tokenizer.eod_id)
                sequence_lengths[-1] += 1
            sequences.append(len(sequence_lengths) - before)
        return Encoded(np.array(tokens, self.dtype), sequence_lengths, sequences)


@cache
def _tokenizer(encoder: Encoder) -> Tokenizer:
    """One tokenizer for each process, made when it is first needed."""
    # One thread for each worker: threads of the library would fight with the other workers for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return build_tokenizer(encoder.settings)


def _encode_one(document: RawDocument, text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of one text, so that an error of the tokenizer names the document."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{document.place}: {error}") from None


@dataclass(frozen=True)
class Encoded:
    """Tokens of the documents of a batch under one key.

    Attributes: `tokens` [n]; `sequence_lengths` [sequences], n in sum; `sequences` [documents], sequences of each.
    """

    tokens: np.ndarray
    sequence_lengths: list[int]
    sequences: list[int]


@dataclass
class Totals:
    """What has been done: `documents` and bytes of input read, tokens written under each key."""

    documents: int = 0
    input_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)


def output_prefix_of(output_prefix: str, key: str) -> str:
    """Megatron's name for the dataset of one key, without .bin or .idx."""
    return f"{output_prefix}_{key}_document"


def preprocess(
    paths: list[Path], output_prefix: str, encoder: Encoder, workers: int, report: Callable[[Totals], None]
) -> Totals:
    """Write `<output_prefix>_<key>_document.bin` and `.idx` for each key; the bytes do not depend on `workers`.

    The files appear when all of them are whole. Memory: a few batches of 1 MiB of text (or one document, where that is
    larger) for each worker, and 12 bytes a document.

    Args:
        paths: input files, see `documents`.
        output_prefix: start of the paths of the output.
        encoder: makes the tokens; each of its keys gives a dataset of its own.
        workers: processes that tokenize; 1 works in this one.
        report: called with the running totals after each batch.

    Raises:
        ValueError: a document is broken, a file cannot be read or written, or a worker died; nothing is written then.
    """
    totals = Totals(tokens=dict.fromkeys(encoder.keys, 0))
    try:
        with ExitStack() as stack:
            writers = {
                key: stack.enter_context(IndexedDatasetWriter(output_prefix_of(output_prefix, key), encoder.dtype))
                for key in encoder.keys
            }
            for batch, encoded in _encode_all(_batches(read_documents(paths)), encoder, workers):
                for (key, writer), part in zip(writers.items(), encoded, strict=True):
                    _write(writer, part)
                    totals.tokens[key] = writer.num_tokens
                totals.documents += len(batch)
                totals.input_bytes += sum(len(document.content) for document in batch)
                report(totals)
            if totals.documents == 0:
                raise ValueError(f"There is no document in {', '.join(map(str, paths))}.")
            # A full disk shows here, before the first file moves to its place.
            for writer in writers.values():
                writer.finish()
    except OSError as error:
        raise ValueError(f"{output_prefix} cannot be written: {error.strerror or error}.") from None
    return totals


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        if document.is_blank:
            continue
        batch.append(document)
        size += len(document.content)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(
    batches: Iterator[list[RawDocument]], encoder: Encoder, workers: int
) -> Iterator[tuple[list[RawDocument], list[Encoded]]]:
    """Every batch with its tokens, in order, with a bounded number of batches under way."""
    if workers == 1:
        for batch in batches:
            yield batch, encoder(batch)
        return
    # Fresh processes: the tokenizer libraries hold threads, which do not survive a fork.
    # An interrupt goes to all processes of a terminal; this one ends the others.
    with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        under_way: deque[tuple[list[RawDocument], Future[list[Encoded]]]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, pool.submit(encoder, batch)))
                if len(under_way) == BATCHES_PER_WORKER * workers:
                    first, future = under_way.popleft()
                    yield first, future.result()
            while under_way:
                first, future = under_way.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise ValueError(
                "A worker process was ended from outside, most likely for want of memory: use fewer --workers."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write(writer: IndexedDatasetWriter, encoded: Encoded) -> None:
    token = sequence = 0
    for count in encoded.sequences:
        lengths = encoded.sequence_lengths[sequence : sequence + count]
        end = token + sum(lengths)
        writer.add_document(encoded.tokens[token:end], lengths)
        token, sequence = end, sequence + count
