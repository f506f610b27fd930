"""Merges datasets into one."""

import json
import time
from pathlib import Path

from megallm.config.report import counted
from megallm.data.command_line import ToolParser, output_prefix, progress_of
from megallm.data.indexed.merge import datasets_in, merge_datasets
from megallm.data.indexed.transfer import bytes_of

DESCRIPTION = """\
Merges datasets (.bin and .idx) into one, their documents one after another; the bytes are those of Megatron's merge.

The output appears when it is whole. Memory does not grow with the datasets. Datasets of other token types, or made with
other tokenizers, as the records beside them say, are refused."""
EPILOG = """\
examples:
  python tools/merge_datasets.py --input shards/ --output-prefix data/books
  python tools/merge_datasets.py --input data/wiki_text_document data/books_text_document --output-prefix data/all"""


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="a folder, whose datasets are taken in the order of their names; or datasets, without .bin or .idx",
    )
    parser.add_argument(
        "--output-prefix", required=True, type=output_prefix, metavar="PREFIX", help="path of the output without .bin"
    )
    parser.add_argument("--multimodal", action="store_true", help="of Megatron; refused: such datasets are not read")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(argv)

    def work() -> None:
        if options.multimodal:
            raise ValueError("Multimodal datasets, those with a mode for each sequence, cannot be merged.")
        prefixes = [
            prefix for path in options.input for prefix in (datasets_in(Path(path)) if Path(path).is_dir() else [path])
        ]
        start = time.perf_counter()
        with progress_of() as progress:
            merged = merge_datasets(prefixes, options.output_prefix, progress)
        seconds = time.perf_counter() - start
        size = bytes_of([merged])
        if options.json:
            result = {
                "inputs": prefixes,
                "output": options.output_prefix,
                "documents": merged.num_documents,
                "sequences": merged.num_sequences,
                "tokens": merged.num_tokens,
                "bytes": size,
                "seconds": seconds,
            }
            print(json.dumps(result, indent=2))
        else:
            print(
                f"{options.output_prefix}.bin, .idx: {merged.num_documents} documents, {merged.num_tokens} tokens "
                f"from {counted(len(prefixes), 'dataset')}; {size / 1e6:.1f} MB in {seconds:.1f} s, "
                f"{size / 1e6 / seconds:.0f} MB/s"
            )

    parser.run(work)


if __name__ == "__main__":
    main()
