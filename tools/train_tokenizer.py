"""Trains a tokenizer on text files."""

import os
import secrets
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from megallm.data.command_line import ToolParser, add_bad_input_arguments, positive, progress_of
from megallm.data.text.documents import read_documents, texts_of
from megallm.data.text.inputs import STANDARD_INPUT, find_inputs
from megallm.data.text.raw import BadDocument, RawDocument
from megallm.data.tokenizer.base import Tokenizer, state_special_tokens
from megallm.data.tokenizer.training import TRAINED_KINDS, TrainingSettings, train_tokenizer

DESCRIPTION = """\
Trains a tokenizer on text files.

bpe, unigram: byte-level, every text can be encoded and comes back unchanged; <|endoftext|>, id 0,
ends documents.
wordpiece: BERT's; [PAD], [UNK], [CLS], [SEP], [MASK] are ids 0 to 4.
These three are written as tokenizer.json, wordpiece to a name that ends in .txt as vocab.txt.
sentencepiece-bpe, sentencepiece-unigram: a .model file; <unk>, <s>, </s> are ids 0 to 2, and </s>
ends documents.

The last documents are held out; on them the tool reports how many bytes a token stands for. The
input is read three times, a document at a time; SentencePiece holds all of it in memory while it
trains."""
EPILOG = """\
example:
  python tools/train_tokenizer.py --input books.jsonl --vocab-size 8192 --output tokenizer.json
  preprocess and train with --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json"""
# Bad documents that are shown with their place; the others are counted.
SHOWN_BAD_DOCUMENTS = 10
# Texts that are encoded at once when the result is measured.
BATCH = 256


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="FILE", help="text files, patterns or folders, packed or not"
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of the texts (text)")
    parser.add_argument("--type", choices=TRAINED_KINDS, default="bpe", help="kind of tokenizer (bpe)")
    parser.add_argument("--vocab-size", required=True, type=positive, metavar="N", help="tokens to make")
    parser.add_argument("--output", required=True, metavar="FILE", help="tokenizer.json, vocab.txt or .model to write")
    parser.add_argument(
        "--special-tokens",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="texts that are tokens of their own, in addition",
    )
    parser.add_argument("--held-out", type=share, default=0.05, metavar="SHARE", help="share to measure on (0.05)")
    parser.add_argument("--lower-case", action="store_true", help="wordpiece without upper case and accents")
    parser.add_argument(
        "--no-byte-fallback",
        action="store_true",
        help="sentencepiece writes a character that it has not met as <unk>, not as bytes",
    )
    parser.add_argument(
        "--character-coverage",
        type=share,
        default=0.9995,
        metavar="SHARE",
        help="share of the characters that sentencepiece makes pieces of (0.9995)",
    )
    add_bad_input_arguments(parser)
    return parser


def share(text: str) -> float:
    """An argparse type: a number above 0 and not above 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


class Input:
    """Text files and the keys of their texts. Attributes: `num_bad`, documents left out by `texts` so far."""

    def __init__(self, paths: list[Path], keys: list[str], skip_bad: bool, max_document_bytes: int) -> None:
        self.paths = paths
        self._keys, self._skip_bad, self._max_document_bytes = keys, skip_bad, max_document_bytes
        self.num_bad = 0

    def documents(self) -> Iterator[RawDocument]:
        """All documents but the blank ones."""
        documents = read_documents(self.paths, max_document_bytes=self._max_document_bytes, keys=self._keys)
        return (document for document in documents if not document.is_blank)

    def sizes(self) -> list[int]:
        """Bytes of each document."""
        sizes = []
        with progress_of() as progress:
            for document in self.documents():
                sizes.append(len(document.content))
                progress(sizes[-1])
        return sizes

    def texts(self, first: int, last: int, progress: Callable[[int], None]) -> Iterator[str]:
        """Texts of documents `first` to `last - 1`. Raises BadDocument, unless such are to be skipped."""
        for document in islice(self.documents(), first, last):
            try:
                for texts in texts_of(document, self._keys):
                    yield from texts
            except BadDocument as error:
                if not self._skip_bad:
                    raise
                self.num_bad += 1
                if self.num_bad <= SHOWN_BAD_DOCUMENTS:
                    print(f"Skipped: {error}", file=sys.stderr)
                continue
            progress(len(document.content))
        if self.num_bad == last:
            raise ValueError(f"All {last} documents to train on are bad; nothing is written.")


def bytes_per_token(tokenizer: Tokenizer, texts: Iterator[str]) -> float:
    """Bytes of UTF-8 that a token stands for, on average over the texts."""
    num_bytes = num_tokens = 0
    while batch := list(islice(texts, BATCH)):
        num_bytes += sum(len(text.encode("utf-8")) for text in batch)
        num_tokens += len(tokenizer.encode_flat(batch)[0])
    return num_bytes / max(num_tokens, 1)


def write(content: bytes, output: Path) -> None:
    """Write the file beside its place and move it there when it is whole."""
    temporary = output.with_name(f"{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, output)
    except OSError as error:
        # Where a file stands in the place of its folder, there is nothing to remove.
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{output} cannot be written: {error.strerror}.") from None


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)

    def work() -> None:
        settings = TrainingSettings(
            kind=options.type,
            vocab_size=options.vocab_size,
            special_tokens=tuple(options.special_tokens),
            lower_case=options.lower_case,
            byte_fallback=not options.no_byte_fallback,
            character_coverage=options.character_coverage,
        )
        skip_bad, output = options.on_bad_document == "skip", Path(options.output)
        source = Input(find_inputs(options.input), options.json_keys, skip_bad, options.max_document_bytes)
        check(settings, source, output)
        sizes = source.sizes()
        total = len(sizes)
        if total < 2:
            raise ValueError(f"Training needs 2 documents at least, one of them held out; the input has {total}.")
        held_out = min(max(1, round(total * options.held_out)), total - 1)
        with progress_of(sum(sizes[: total - held_out])) as progress:
            trained = train_tokenizer(settings, source.texts(0, total - held_out, progress), output)
        num_trained = total - held_out - source.num_bad
        tokenizer = trained.tokenizer
        with progress_of(sum(sizes[total - held_out :])) as progress:
            measured = bytes_per_token(tokenizer, source.texts(total - held_out, total, progress))
        write(trained.content, output)
        skipped = f"; {source.num_bad} bad documents skipped" if source.num_bad else ""
        print(f"{output}: {tokenizer.vocab_size} tokens, from {num_trained} documents{skipped}")
        print(state_special_tokens(tokenizer))
        print(f"{measured:.3f} bytes per token on the {total - source.num_bad - num_trained} documents held out")
        if tokenizer.vocab_size < options.vocab_size:
            print(f"The text has no more than that to merge; {options.vocab_size} tokens need more text.")

    parser.run(work)


def check(settings: TrainingSettings, source: Input, output: Path) -> None:
    """Find what would fail after the training, before it."""
    if STANDARD_INPUT in source.paths:
        raise ValueError("The input is read more than once: give files, not the standard input.")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: give the name of the file to write.")
    if settings.lower_case and settings.kind != "wordpiece":
        raise ValueError(f"--lower-case acts on --type wordpiece only, not on {settings.kind}.")
    if settings.kind.startswith("sentencepiece-") != (output.suffix == ".model"):
        wanted = "a name that ends in .model" if settings.kind.startswith("sentencepiece-") else "tokenizer.json"
        raise ValueError(f"--output {output} is no name for --type {settings.kind}: give {wanted}.")


if __name__ == "__main__":
    main()
