"""Shows what is in a dataset, verifies every byte of it, and compares it with another."""

import argparse
import json
from typing import Any

from megallm.data.command_line import ToolParser, add_tokenizer_arguments, positive, progress_of, tokenizer_settings
from megallm.data.indexed.compare import first_difference
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.statistics import describe, sample_tokens, scan_tokens
from megallm.data.tokenizer.base import Tokenizer
from megallm.data.tokenizer.build import build_tokenizer
from megallm.data.tokenizer.record import check_record, read_record

DESCRIPTION = """\
Shows what is in datasets (.bin and .idx): counts, type, lengths, special tokens, documents. Opening one checks every
field of its index; --verify reads every token as well.

Special tokens are those of the tokenizer that is given, or that the record beside the dataset names.
Exit code: 0; 1 where --compare finds a difference; 2 where a dataset is broken or cannot be read."""
EPILOG = """\
examples:
  python tools/inspect_dataset.py data/books_text_document --verify
  python tools/inspect_dataset.py data/books_text_document --decode 0 17 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json
  python tools/inspect_dataset.py data/new_text_document --compare data/old_text_document"""
SAMPLED_DOCUMENTS = 1000
BAR_WIDTH = 40


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="datasets, without .bin or .idx")
    parser.add_argument(
        "--verify", action="store_true", help="read every token: each must be in the vocabulary, where it is known"
    )
    parser.add_argument("--compare", metavar="OTHER", help="find the first difference to this dataset")
    parser.add_argument(
        "--decode", nargs="+", type=int, default=[], metavar="N", help="show these documents; the first is 0"
    )
    parser.add_argument(
        "--decode-tokens", type=positive, default=256, metavar="N", help="tokens shown of each document (256)"
    )
    parser.add_argument("--json", action="store_true", help="print a list with one object for each dataset, as JSON")
    add_tokenizer_arguments(parser, required=False)
    return parser


def special_tokens(tokenizer: Tokenizer | None, record: dict[str, Any] | None) -> dict[str, tuple[str, int]]:
    """Text and id of each special token by its role, as the tokenizer or else the record says."""
    if tokenizer is not None:
        return {role: (tokenizer.token_text(number), number) for role, number in tokenizer.special_tokens().items()}
    if record is not None:
        return {role: (token["text"], token["id"]) for role, token in record["special_tokens"].items()}
    return {}


def inspect(prefix: str, options: argparse.Namespace, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Everything that is asked about one dataset."""
    dataset = IndexedDataset(prefix)
    result = describe(dataset)
    record = read_record(prefix)
    result["record"] = record
    if tokenizer is not None:
        check_record(prefix, tokenizer)
    vocab_size = options.vocab_size
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    elif record is not None:
        vocab_size = record["vocab_size"]
    result["vocab_size"] = vocab_size
    special = special_tokens(tokenizer, record)
    ids = [number for _, number in special.values()]
    _, end_id = special.get("end of document", (None, None))
    if options.verify:
        with progress_of(result["bin_bytes"]) as progress:
            report = scan_tokens(dataset, ids, end_id, vocab_size, progress)
    else:
        report = sample_tokens(dataset, ids, end_id, SAMPLED_DOCUMENTS if special else 0)
    result["verified"] = options.verify
    result["special_tokens"] = {
        "documents_read": report.documents,
        "tokens_read": report.tokens,
        "tokens": [
            {"role": role, "text": text, "id": number, "count": report.counts[number]}
            for role, (text, number) in special.items()
        ],
        "documents_ended": None if end_id is None else report.ended,
        "first_document_not_ended": report.first_not_ended,
    }
    result["decoded"] = [shown(dataset, number, options.decode_tokens, tokenizer) for number in options.decode]
    if options.compare is not None:
        with progress_of(result["bin_bytes"]) as progress:
            result["difference"] = first_difference(dataset, IndexedDataset(options.compare), progress)
        result["compared_with"] = options.compare
    return result


def shown(dataset: IndexedDataset, number: int, limit: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The first tokens of a document, and their text."""
    try:
        start, stop = dataset.document_range(number)
    except IndexError as error:
        raise ValueError(f"--decode {number}: {error}") from None
    ids = dataset.tokens(start, min(stop, start + limit)).tolist()
    text = None if tokenizer is None else tokenizer.decode(ids)
    return {"document": number, "tokens": stop - start, "ids": ids, "text": text}


def print_lengths(name: str, lengths: dict[str, Any]) -> None:
    print(f"  tokens of a {name}: {lengths['min']} to {lengths['max']}, mean {lengths['mean']:.1f}")
    most = max((entry["count"] for entry in lengths["histogram"]), default=1) or 1
    for entry in lengths["histogram"]:
        area = f"{entry['from']}" if entry["from"] == entry["to"] else f"{entry['from']} to {entry['to']}"
        print(f"    {area:>24}  {entry['count']:>12}  {'#' * round(BAR_WIDTH * entry['count'] / most)}".rstrip())


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['prefix']}")
    print(
        f"  {result['documents']} documents ({result['documents_without_tokens']} without tokens), "
        f"{result['sequences']} sequences, {result['tokens']} tokens as {result['dtype']}, {result['bin_bytes']} bytes"
    )
    print_lengths("document", result["document_lengths"])
    if result["sequences"] != result["documents"] - result["documents_without_tokens"]:
        print_lengths("sequence", result["sequence_lengths"])
    if result["record"] is not None:
        record = result["record"]
        print(f"  made with {record['kind']} {record.get('source') or ''} ({record['checksum']})")
    special = result["special_tokens"]
    print_special_tokens(special, result["verified"])
    if result["verified"]:
        ids = "no vocabulary to check them against" if result["vocab_size"] is None else f"below {result['vocab_size']}"
        print(f"  verified: every field of the index, and every token ({ids})")
    for document in result["decoded"]:
        print(f"  document {document['document']}, {document['tokens']} tokens, the first {len(document['ids'])}:")
        print(f"    {document['ids'] if document['text'] is None else document['text']!r}")
    if "compared_with" in result:
        print_difference(result["difference"], result["compared_with"])


def print_special_tokens(special: dict[str, Any], verified: bool) -> None:
    if not special["tokens"]:
        return
    where = "all" if verified else "a sample of"
    counts = ", ".join(f"{token['text']} = {token['id']}: {token['count']}" for token in special["tokens"])
    print(f"  special tokens among {where} {special['tokens_read']} tokens: {counts}")
    if special["documents_ended"] is not None and special["documents_read"]:
        share = special["documents_ended"] / special["documents_read"]
        first = special["first_document_not_ended"]
        print(
            f"  {special['documents_ended']} of {special['documents_read']} documents ({share:.1%}) end with "
            f"{special['tokens'][0]['text']}" + ("" if first is None else f"; document {first} does not")
        )


def print_difference(difference: dict[str, Any] | None, other: str) -> None:
    if difference is None:
        print(f"  the same as {other}, byte for byte")
        return
    place = "" if difference["document"] is None else f"document {difference['document']}"
    place += "" if difference["position"] is None else f", position {difference['position']}"
    print(f"  differs from {other}: {place}{': ' if place else ''}{difference['what']}")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(argv)
    results: list[dict[str, Any]] = []

    def work() -> None:
        tokenizer = build_tokenizer(tokenizer_settings(options)) if options.tokenizer_type else None
        for prefix in options.prefixes:
            results.append(inspect(prefix, options, tokenizer))
            if not options.json:
                print_result(results[-1])
        if options.json:
            print(json.dumps(results, indent=2, ensure_ascii=False))

    parser.run(work)
    if any(result.get("difference") is not None for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
