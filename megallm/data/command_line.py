"""Argument parsing shared by the tools: mistakes are one sentence and exit code 2."""

import argparse
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import NoReturn

from megallm.data.tokenizer.base import TokenizerSettings
from megallm.data.tokenizer.build import TOKENIZER_TYPES


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
            if flag.startswith("--") and flag not in known:
                close = get_close_matches(flag, known, n=1, cutoff=0.5)
                self.error(f"there is no argument {flag}; " + (f"the nearest is {close[0]}" if close else "see --help"))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message.rstrip('.')}.", file=sys.stderr)
        raise SystemExit(2)

    def run(self, work: Callable[[], None]) -> None:
        """Do the work of the tool; a mistake of the user's ends it with its sentence."""
        try:
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


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--tokenizer-type`, `--tokenizer-model`, `--vocab-size`."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type", required=required, metavar="TYPE", help=f"one of {', '.join(TOKENIZER_TYPES)}"
    )
    group.add_argument(
        "--tokenizer-model", metavar="PATH", help="tokenizer.json or its folder; or SentencePiece .model"
    )
    group.add_argument("--vocab-size", type=positive, metavar="N", help="size of NullTokenizer; others know their own")


def tokenizer_settings(options: argparse.Namespace) -> TokenizerSettings:
    """The settings that the arguments of `add_tokenizer_arguments` gave."""
    return TokenizerSettings(options.tokenizer_type, options.tokenizer_model, vocab_size=options.vocab_size)
