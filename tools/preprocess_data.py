"""Tokenizes text files into the .bin/.idx files that training reads."""

import os
import sys
import time

from tqdm import tqdm

from megallm.data.command_line import ToolParser, add_tokenizer_arguments, positive, tokenizer_settings
from megallm.data.prepare.job import Encoder, Totals, output_prefix_of, preprocess
from megallm.data.text.inputs import find_inputs

DESCRIPTION = """\
Tokenizes text files into the .bin/.idx files that training reads.

Input: .jsonl or .json, one JSON object a line, its text under --json-keys (blank lines are passed over);
.txt, one document a file. Files are read in the order given, and documents keep their order.
Output: PREFIX_KEY_document.bin and .idx for each key, in Megatron's format, the same bytes whatever --workers.
They appear when they are whole: after an error or an interrupt there is nothing new."""
EPILOG = """\
example:
  python tools/preprocess_data.py --input books.jsonl notes.txt --output-prefix data/books --append-eod \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json
  gives data/books_text_document.bin and .idx; train with --data-path data/books_text_document"""


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    group = parser.add_argument_group("input and output")
    group.add_argument("--input", required=True, nargs="+", metavar="FILE", help="text files")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="start of the output's paths")
    group.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of the texts (text)")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add_tokenizer_arguments(parser)
    group = parser.add_argument_group("work")
    group.add_argument("--workers", type=positive, metavar="N", help="tokenizing processes (one for each core)")
    group.add_argument(
        "--log-interval", type=positive, default=1000, metavar="N", help="documents between reports (1000)"
    )
    group.add_argument("--partitions", type=positive, metavar="N", help="accepted and not needed: input is one stream")
    group.add_argument("--keep-sequential-samples", action="store_true", help="accepted and not needed: always so")
    return parser


def usable_cores() -> int:
    """Cores that this process may run on, where the system tells; otherwise all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """A bar on a terminal; elsewhere a line on the error stream every `log_interval` documents."""

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self._log_interval, self._reported = log_interval, 0
        self.start = time.perf_counter()
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, file=sys.stderr)

    def __call__(self, totals: Totals) -> None:
        self._bar.update(totals.input_bytes - self._bar.n)
        if totals.documents - self._reported >= self._log_interval:
            self._reported = totals.documents
            if self._bar.disable:
                print(f"Processed {totals.documents} documents ({self.rates(totals)}).", file=sys.stderr, flush=True)
            else:
                self._bar.set_postfix_str(self.rates(totals))

    def rates(self, totals: Totals) -> str:
        seconds = time.perf_counter() - self.start
        return f"{totals.documents / seconds:.1f} documents/s, {totals.input_bytes / seconds / 1e6:.2f} MB/s"

    def close(self) -> None:
        self._bar.close()


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)

    def work() -> None:
        if len(set(options.json_keys)) < len(options.json_keys):
            raise ValueError(f"--json-keys {' '.join(options.json_keys)} names a key twice.")
        paths = find_inputs(options.input)
        encoder = Encoder(
            tokenizer_settings(options),
            tuple(options.json_keys),
            options.append_eod,
        )
        workers = options.workers or usable_cores()
        progress = Progress(sum(path.stat().st_size for path in paths), options.log_interval)
        try:
            totals = preprocess(paths, options.output_prefix, encoder, workers, progress)
        finally:
            progress.close()
        print(f"{totals.documents} documents, {totals.input_bytes / 1e6:.2f} MB; {progress.rates(totals)}")
        for key, tokens in totals.tokens.items():
            print(f"{output_prefix_of(options.output_prefix, key)}.bin, .idx: {tokens} tokens")

    parser.run(work)


if __name__ == "__main__":
    main()
