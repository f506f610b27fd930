"""Trains a byte-level BPE tokenizer on text files."""

import os
import secrets
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megallm.data.command_line import ToolParser, positive
from megallm.data.text.documents import RawDocument, read_documents, texts_of
from megallm.data.text.inputs import find_inputs

DESCRIPTION = """\
Trains a byte-level BPE tokenizer on text files and writes it as tokenizer.json.

Byte-level: every text can be encoded and comes back unchanged. The token <|endoftext|>, id 0, ends documents.
The last 5 % of the documents are held out; on them the tool reports how many bytes a token stands for."""
EPILOG = """\
example:
  python tools/train_tokenizer.py --input books.jsonl --vocab-size 8192 --output tokenizer.json
  preprocess and train with --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json"""
END_OF_DOCUMENT = "<|endoftext|>"
HELD_OUT = 0.05
# One token for each byte, and the one that ends documents.
SMALLEST_VOCABULARY = 257


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    parser.add_argument("--input", required=True, nargs="+", metavar="FILE", help=".jsonl, .json or .txt files")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of the texts (text)")
    parser.add_argument("--vocab-size", required=True, type=positive, metavar="N", help="tokens to make, 257 at least")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write tokenizer.json")
    return parser


def documents_of(paths: list[Path]) -> Iterator[RawDocument]:
    return (document for document in read_documents(paths) if not document.is_blank)


def read_texts(paths: list[Path], keys: list[str], first: int, last: int) -> Iterator[str]:
    """Texts of documents `first` to `last - 1`."""
    for document in islice(documents_of(paths), first, last):
        for texts in texts_of(document, keys):
            yield from texts


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer, texts: Iterator[str]) -> float:
    """Bytes of UTF-8 that a token stands for, on average over the texts."""
    num_bytes = num_tokens = 0
    for text in texts:
        num_bytes += len(text.encode("utf-8"))
        num_tokens += len(tokenizer.encode(text).ids)
    return num_bytes / max(num_tokens, 1)


def write(tokenizer: Tokenizer, output: Path) -> None:
    """Write the file beside its place and move it there when it is whole."""
    temporary = output.with_name(f"{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(temporary, output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{output} cannot be written: {error.strerror}.") from None


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)

    def work() -> None:
        if options.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"--vocab-size {options.vocab_size} is too small: 256 bytes and {END_OF_DOCUMENT} need "
                f"{SMALLEST_VOCABULARY}."
            )
        paths, keys = find_inputs(options.input), options.json_keys
        total = sum(1 for _ in documents_of(paths))
        if total < 2:
            raise ValueError(f"Training needs 2 documents at least, one of them held out; the input has {total}.")
        held_out = max(1, round(total * HELD_OUT))
        tokenizer = train(read_texts(paths, keys, 0, total - held_out), options.vocab_size)
        measured = bytes_per_token(tokenizer, read_texts(paths, keys, total - held_out, total))
        write(tokenizer, Path(options.output))
        print(f"{options.output}: {tokenizer.get_vocab_size()} tokens, from {total - held_out} documents")
        print(f"{measured:.3f} bytes per token on the {held_out} documents held out")
        if tokenizer.get_vocab_size() < options.vocab_size:
            print(f"The text has no more than that to merge; {options.vocab_size} tokens need more text.")

    parser.run(work)


if __name__ == "__main__":
    main()
