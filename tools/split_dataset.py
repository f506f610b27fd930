"""Splits a dataset into several."""

import json
from collections.abc import Callable, Sequence

from megallm.data.command_line import ToolParser, output_prefix, positive, progress_of
from megallm.data.indexed.split import counts_of_shares, split_dataset

DESCRIPTION = """\
Splits a dataset (.bin and .idx) into several, cut between documents, which keep their order.

The parts are PREFIX_0, PREFIX_1, ..., or PREFIX_NAME with --names. They appear when all of them are whole. Memory does
not grow with the dataset."""
EPILOG = """\
examples:
  python tools/split_dataset.py --input data/all --output-prefix data/all --shares 95,5 --names train valid
  python tools/split_dataset.py --input data/all --output-prefix shards/all --parts 8
  python tools/split_dataset.py --input data/all --output-prefix data/all --documents 1000,rest"""


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    parser.add_argument("--input", required=True, metavar="PREFIX", help="the dataset, without .bin or .idx")
    parser.add_argument(
        "--output-prefix", required=True, type=output_prefix, metavar="PREFIX", help="start of the paths of the parts"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--shares", metavar="A,B,...", help="parts in proportion to these numbers, by documents")
    how.add_argument("--documents", metavar="N,M,...", help="documents of each part; the last may be: rest")
    how.add_argument("--parts", type=positive, metavar="N", help="N parts of as many documents each")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names of the parts instead of 0, 1, ...")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def counts_of_documents(num_documents: int, words: Sequence[str]) -> list[int]:
    """The counts that `--documents` gives; `rest` is what remains."""
    counts: list[int] = []
    for position, word in enumerate(words):
        if word == "rest" and position == len(words) - 1:
            counts.append(num_documents - sum(counts))
        elif word.isdecimal():
            counts.append(int(word))
        else:
            raise ValueError(f"--documents takes whole numbers and a last 'rest', not {word!r}.")
    return counts


def numbers_of(text: str) -> list[float]:
    """The numbers that `--shares` gives."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--shares takes numbers with commas between them, such as 95,5, not {text!r}.") from None


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(argv)

    def work() -> None:
        counts: Callable[[int], Sequence[int]]
        if options.documents is not None:
            words = options.documents.split(",")
            parts, counts = len(words), lambda documents: counts_of_documents(documents, words)
        else:
            shares = [1.0] * options.parts if options.parts else numbers_of(options.shares)
            parts, counts = len(shares), lambda documents: counts_of_shares(documents, shares)
        names = options.names or [str(number) for number in range(parts)]
        if len(names) != parts or len(set(names)) != parts:
            raise ValueError(f"{parts} parts need as many different --names, not {' '.join(names)}.")
        prefixes = [f"{options.output_prefix}_{name}" for name in names]
        with progress_of() as progress:
            pieces = split_dataset(options.input, prefixes, counts, progress)
        if options.json:
            result = [
                {
                    "output": piece.path_prefix,
                    "documents": piece.num_documents,
                    "sequences": piece.num_sequences,
                    "tokens": piece.num_tokens,
                }
                for piece in pieces
            ]
            print(json.dumps(result, indent=2))
        else:
            for piece in pieces:
                print(f"{piece.path_prefix}.bin, .idx: {piece.num_documents} documents, {piece.num_tokens} tokens")

    parser.run(work)


if __name__ == "__main__":
    main()
