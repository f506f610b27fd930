"""Tokenizes text files into the .bin/.idx files that training reads."""

import argparse
import os
import sys

from megallm.data.command_line import (
    ToolParser,
    add_bad_input_arguments,
    add_tokenizer_arguments,
    output_prefix,
    positive,
    tokenizer_settings,
)
from megallm.data.prepare.encoding import EncodeSettings
from megallm.data.prepare.interrupts import Interrupted, interrupts_raise
from megallm.data.prepare.job import Job, Outcome
from megallm.data.prepare.memory import state_memory
from megallm.data.prepare.progress import Progress
from megallm.data.prepare.settings import JobSettings
from megallm.data.prepare.shards import merge_shards, parse_shard
from megallm.data.prepare.worker_count import default_workers, measure_workers
from megallm.data.text.inputs import KINDS, find_inputs
from megallm.data.tokenizer.base import state_library, state_special_tokens

DESCRIPTION = f"""\
Tokenizes text files into the .bin/.idx files that training reads.

Input: {KINDS};
patterns, folders, and - for JSON lines on the standard input. Text stands under --json-keys; a .txt
file is one document. Files are read in the order given, and documents keep their order. Blank lines
are passed over.
Output: PREFIX_KEY_document.bin and .idx for each key (_sentence with --split-sentences), in
Megatron's format, the same bytes whatever --workers; and PREFIX_KEY_document.tokenizer.json, which
says what made them.

The work is done in PREFIX.preprocessing/, and the output appears when it is whole. Killed at any
moment, the same command goes on where it was. After an error in the input or on a full disk nothing
is left, unless --keep is given. Text on the standard input cannot be read again: an interrupted job
starts over.

Memory: for each worker 0.2 GB and about 140 times the longest document with the tokenizers library,
40 times with sentencepiece, 10 times with gigatoken; said at the start. --max-document-bytes bounds
it; nothing grows with the number of documents or the size of the files."""
EPILOG = """\
example:
  python tools/preprocess_data.py --input books.jsonl notes.txt --output-prefix data/books \\
      --append-eod --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json
  gives data/books_text_document.bin and .idx; train with --data-path data/books_text_document

on several machines, with one folder for all:
  machine i of 8:  the same command with --shard i/8 (i from 0), or with --shard auto under torchrun
                   or in a Slurm array
  then, anywhere:  python tools/preprocess_data.py --output-prefix data/books --merge-shards 8"""


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    group = parser.add_argument_group("input and output")
    group.add_argument("--input", nargs="+", metavar="FILE", help="text files, patterns, folders, or -")
    group.add_argument(
        "--output-prefix", required=True, type=output_prefix, metavar="PREFIX", help="start of the output's paths"
    )
    group.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of the texts (text)")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group.add_argument("--split-sentences", action="store_true", help="a sequence for each sentence of a document")
    group.add_argument("--keep-newlines", action="store_true", help="keep line breaks between sentences")
    group.add_argument("--lang", default="english", help="language of the sentences (english)")
    group.add_argument(
        "--overwrite", action="store_true", help="replace an output, or an interrupted job, of other input"
    )
    add_tokenizer_arguments(parser, required=False)
    group = add_bad_input_arguments(parser)
    group.add_argument("--keep", action="store_true", help="keep what is done after an error, to go on from there")
    _add_work_arguments(parser)
    return parser


def _add_work_arguments(parser: ToolParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument("--workers", type=positive, metavar="N", help="tokenizing processes (one for each core)")
    group.add_argument(
        "--log-interval", type=positive, default=1000, metavar="N", help="documents between reports (1000)"
    )
    group.add_argument(
        "--journal-interval", type=float, default=5.0, metavar="SECONDS", help="work that is lost at most by a kill (5)"
    )
    group.add_argument("--shard", metavar="I/N", help="do share I, from 0, of N; auto: as torchrun or Slurm numbers it")
    group.add_argument("--merge-shards", type=positive, metavar="N", help="make one output of N finished shards")
    group.add_argument(
        "--find-optimal-num-workers", action="store_true", help="measure numbers of workers, and write nothing"
    )
    group.add_argument(
        "--workers-to-check", type=positive, nargs="+", default=[16, 32, 64], metavar="N", help="which ones (16 32 64)"
    )
    group.add_argument(
        "--max-documents", type=positive, default=100_000, metavar="N", help="documents to measure with (100000)"
    )
    group.add_argument("--partitions", type=positive, metavar="N", help="accepted and not needed: input is one stream")
    group.add_argument("--keep-sequential-samples", action="store_true", help="accepted and not needed: always so")
    group.add_argument("--tokenizer-metadata", metavar="PATH", help="accepted and not needed: the type says it")
    for flag in ("--legacy-tokenizer", "--tokenizer-hf-use-fast", "--trust-remote-code"):
        group.add_argument(flag, action="store_true", help="accepted without effect: a tokenizer is read in one way")


def job_settings(options: argparse.Namespace) -> JobSettings:
    """The job that the arguments describe."""
    for name in ("input", "tokenizer_type"):
        if getattr(options, name) is None:
            raise ValueError(f"the following arguments are required: --{name.replace('_', '-')}")
    encode = EncodeSettings(
        tokenizer=tokenizer_settings(options),
        keys=tuple(options.json_keys),
        append_eod=options.append_eod,
        sentence_language=options.lang if options.split_sentences else None,
        keep_newlines=options.keep_newlines,
        skip_bad_documents=options.on_bad_document == "skip",
    )
    return JobSettings(
        paths=tuple(find_inputs(options.input)),
        output_prefix=options.output_prefix,
        encode=encode,
        shard=parse_shard(options.shard, os.environ) if options.shard else None,
        max_document_bytes=options.max_document_bytes,
        overwrite=options.overwrite,
        keep=options.keep,
        journal_seconds=options.journal_interval,
    )


def merge(options: argparse.Namespace) -> None:
    merged = merge_shards(
        options.output_prefix, options.json_keys, options.split_sentences, options.merge_shards, options.overwrite
    )
    for piece in merged:
        print(f"{piece.path_prefix}.bin, .idx: {piece.num_documents:,} documents, {piece.num_tokens:,} tokens")


def find_workers(options: argparse.Namespace) -> None:
    def tell(workers: int, documents: float, megabytes: float) -> None:
        print(f"{workers} workers: {documents:.1f} documents/s, {megabytes:.2f} MB/s", flush=True)

    best = measure_workers(Job(job_settings(options)), options.workers_to_check, options.max_documents, tell)
    print(f"Fastest: --workers {best}")


def preprocess(options: argparse.Namespace, program: str) -> None:
    job = Job(job_settings(options))
    settings = job.settings
    workers = options.workers or default_workers(job)
    tokenizer = job.encoder.tokenizer
    print(f"Tokenized by {state_library(tokenizer)}.")
    print(f"Special tokens: {state_special_tokens(tokenizer)}.")
    print(state_memory(tokenizer, workers, settings.max_document_bytes), flush=True)
    if not settings.can_resume:
        print("Standard input cannot be read again: an interrupted job cannot go on, and starts over.", flush=True)
    progress = Progress(options.log_interval)
    try:
        with interrupts_raise():
            outcome = job.run(workers, progress)
    except Interrupted as interrupt:
        progress.close()
        how = "the same command goes on there" if settings.can_resume else "standard input cannot go on: start over"
        done = f"after {progress.totals.documents:,} documents"
        print(f"{program}: ended by {interrupt.signal.name} {done}; {how}.", file=sys.stderr)
        raise SystemExit(128 + interrupt.signal) from None
    finally:
        progress.close()
    _tell(outcome, settings, progress)


def _tell(outcome: Outcome, settings: JobSettings, progress: Progress) -> None:
    """What was done, and what was left out."""
    totals = outcome.totals
    if outcome.done_before:
        print("An earlier start had done the work on this input with these options.")
    for sentence in totals.first_skipped:
        print(f"Skipped: {sentence}", file=sys.stderr)
    skipped = sum(totals.skipped.values())
    if skipped > len(totals.first_skipped):
        print(f"Skipped: {skipped - len(totals.first_skipped):,} more.", file=sys.stderr)
    parts = [f"{totals.documents:,} documents, {totals.input_bytes / 1e6:.2f} MB"]
    if not outcome.done_before:
        parts.append(f"{totals.seconds:.1f} s, {progress.rates(totals)}")
    if skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(totals.skipped.items()))
        parts.append(f"{skipped:,} bad document{'s' * (skipped > 1)} skipped ({kinds})")
    if totals.blank_lines:
        parts.append(f"{totals.blank_lines:,} blank lines passed over")
    print("; ".join(parts))
    for key, tokens in totals.tokens.items():
        print(f"{settings.dataset_prefix(key)}.bin, .idx: {tokens:,} tokens")


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)

    def work() -> None:
        if len(set(options.json_keys)) < len(options.json_keys):
            raise ValueError(f"--json-keys {' '.join(options.json_keys)} names a key twice.")
        if options.merge_shards:
            merge(options)
        elif options.find_optimal_num_workers:
            find_workers(options)
        else:
            preprocess(options, parser.prog)

    parser.run(work)


if __name__ == "__main__":
    main()
