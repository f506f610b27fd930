"""Argument parsing shared by the tools: mistakes are one sentence and exit code 2."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

from tqdm import tqdm

from megallm.config import fail
from megallm.config.report import while_somebody_reads
from megallm.data.text.raw import MAX_DOCUMENT_BYTES
from megallm.data.tokenizer.base import FAST_TOKENIZER, TokenizerSettings
from megallm.data.tokenizer.build import TOKENIZER_TYPES
from megallm.data.tokenizer.tiktoken import PATTERNS


class ToolParser(argparse.ArgumentParser):
    """argparse with whole flags only, the nearest flag for an unknown one, and errors without the usage text."""

    def __init__(self, description: str, epilog: str | None = None) -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args=None, namespace=None):
        # Before argparse looks, which would speak of the arguments that are missing instead.
        known = [option for action in self._actions for option in action.option_strings]
        for word in sys.argv[1:] if args is None else args:
            flag = word.split("=")[0]
            # As argparse does, what holds a space is taken for a value.
            if flag.startswith("--") and " " not in word and flag not in known:
                close = get_close_matches(flag, known, n=1, cutoff=0.5)
                self.error(f"there is no argument {flag}; " + (f"the nearest is {close[0]}" if close else "see --help"))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else "."
        # Of several processes one prints.
        fail(self.prog, ValueError(f"{message.rstrip('.')}{end}"))

    def run(self, work: Callable[[], None]) -> None:
        """Do the work of the tool; a mistake of the user's ends it with its sentence."""
        try:
            with while_somebody_reads():
                work()
        except ValueError as error:
            self.error(re.sub(r"\s+", " ", str(error)))
        except KeyboardInterrupt:
            print(f"{self.prog}: interrupted; nothing was written.", file=sys.stderr)
            raise SystemExit(130) from None


def positive(text: str) -> int:
    """An argparse type: a whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def natural(text: str) -> int:
    """An argparse type: a whole number, 0 or above."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or above")
    return value


def output_prefix(text: str) -> str:
    """An argparse type: the path of an output to which endings are added."""
    if not text or text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} has no name behind its folder: add one, {text}my_data for example")
    return text


@contextmanager
def progress_of(total_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; it is moved by calling what this gives with the bytes done since."""
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:

        def progress(count: int) -> None:
            bar.update(count)

        yield progress


def document_bytes(text: str) -> int:
    """An argparse type: how long a document may be."""
    value = positive(text)
    # A token a byte and some special ones still fit the 32 bits in which an index gives lengths.
    limit = 2**31 - 2**16
    if value > limit:
        raise argparse.ArgumentTypeError(f"{value} is above {limit}, the longest that a token file can hold")
    return value


def add_bad_input_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The arguments that say what is a bad document, and what becomes of it; gives their group."""
    group = parser.add_argument_group("bad input")
    group.add_argument(
        "--on-bad-document",
        choices=("stop", "skip"),
        default="stop",
        help="a broken document, one without a key or too large: stop (default), or leave it out and count it",
    )
    group.add_argument(
        "--max-document-bytes",
        type=document_bytes,
        default=MAX_DOCUMENT_BYTES,
        metavar="N",
        help=f"a longer document is a bad one ({MAX_DOCUMENT_BYTES})",
    )
    return group


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The arguments that `tokenizer_settings` reads, with Megatron's names; `required`, whether there must be one."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type", required=required, metavar="TYPE", help=f"one of {', '.join(TOKENIZER_TYPES)}"
    )
    group.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="tokenizer.json, its folder, a SentencePiece .model, or a tiktoken .tiktoken or .json",
    )
    group.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT2BPETokenizer, vocab.txt of BERT's")
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    group.add_argument(
        "--vocab-size", type=positive, metavar="N", help="size of NullTokenizer, or a cut of TikTokenizer"
    )
    group.add_argument(
        "--vocab-extra-ids", type=natural, default=0, metavar="N", help="sentinels for T5 that are appended (0)"
    )
    group.add_argument(
        "--tokenizer-sentencepiece-legacy",
        action="store_true",
        help="SentencePieceTokenizer appends <CLS>, <SEP>, <EOD>, <MASK>, as in older Megatron; <EOD> ends documents",
    )
    group.add_argument("--null-tokenizer-eod-id", type=natural, metavar="ID", help="ends documents of NullTokenizer")
    group.add_argument(
        "--tiktoken-pattern", choices=tuple(PATTERNS), help="how TikTokenizer cuts words (as the file says)"
    )
    group.add_argument(
        "--tiktoken-num-special-tokens",
        type=natural,
        default=1000,
        metavar="N",
        help="ids set aside before a list of tokens (1000)",
    )
    group.add_argument("--tiktoken-special-tokens", nargs="+", metavar="TEXT", help="special tokens of TikTokenizer")
    group.add_argument(
        "--fast-tokenizer",
        choices=FAST_TOKENIZER,
        default="auto",
        help="gigatoken: auto, where it is installed and gives the same ids; always; never (auto)",
    )


def tokenizer_settings(options: argparse.Namespace) -> TokenizerSettings:
    """The settings that the arguments of `add_tokenizer_arguments` gave."""
    special_tokens = options.tiktoken_special_tokens
    return TokenizerSettings(
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        vocab_size=options.vocab_size,
        vocab_extra_ids=options.vocab_extra_ids,
        tokenizer_sentencepiece_legacy=options.tokenizer_sentencepiece_legacy,
        null_tokenizer_eod_id=options.null_tokenizer_eod_id,
        tiktoken_pattern=options.tiktoken_pattern,
        tiktoken_num_special_tokens=options.tiktoken_num_special_tokens,
        tiktoken_special_tokens=tuple(special_tokens) if special_tokens else None,
        fast_tokenizer=options.fast_tokenizer,
    )
