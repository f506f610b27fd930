"""Builds the indices of a run's samples ahead of it, so that no GPU waits for them."""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megallm.config import parse_arguments, stop
from megallm.config.tree import Config
from megallm.data.command_line import ToolParser, positive
from megallm.data.feeding.loader import SampleSource
from megallm.data.samples.bert import BERTDataset
from megallm.data.samples.blended import BlendedDataset, Part
from megallm.data.samples.gpt import GPTDataset
from megallm.data.samples.masked import MaskedDataset
from megallm.data.samples.t5 import T5Dataset
from megallm.plan.validate import validate
from megallm.train.datasets import Datasets, build_datasets, build_tokenizer_of, with_vocabulary

DESCRIPTION = """\
Builds the indices of the samples of a training run ahead of it, so that no GPU waits for them.

Takes the flags of pretrain_gpt.py, or of pretrain_bert.py with --samples bert, as they are, all of them, and reads the
same data in the same way; it needs no GPU and starts no other process. Indices that are there already are left as they
are. The run then finds all of them in the folder of --data-cache-path, by default cache/GPTDataset_indices, or that of
another kind of samples, beside the first dataset."""
EPILOG = """\
examples:
  python tools/build_index.py --config run.yaml --data-cache-path /shared/indices
  python tools/build_index.py $FLAGS_OF_PRETRAIN_GPT
  python tools/build_index.py $FLAGS_OF_PRETRAIN_GPT --world-size 64 --json
  python tools/build_index.py --samples bert $FLAGS_OF_PRETRAIN_BERT
  python tools/build_index.py --samples t5 --decoder-seq-length 128 --config run.yaml

All other flags: python pretrain_gpt.py --help"""
PROGRAM = "build_index.py"
NAME_WIDTH = 16


@dataclass(frozen=True)
class Built:
    """The indices of one dataset, or of a blend.

    Attributes: `path_prefix` of the dataset, None for the order of a blend; `samples`; `epochs`, how many times over
    the documents are read, None for a blend and for masked samples, whose epochs are shuffled together; `bytes` of the
    indices; `build_seconds`, None where they were there.
    """

    path_prefix: str | None
    samples: int
    epochs: int | None
    bytes: int
    build_seconds: float | None


@dataclass(frozen=True)
class Split:
    """The indices of training, validation or test data.

    Attributes: `name`; `samples` that can be read; `tokens` in them; `datasets`, a blend's order last.
    """

    name: str
    samples: int
    tokens: int
    datasets: list[Built]


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    parser.usage = "%(prog)s [--samples KIND] [--world-size N] [--json] FLAGS OF THE RUN"
    parser.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help="processes of the run; needed only without --global-batch-size, which follows from it then",
    )
    parser.add_argument(
        "--samples",
        choices=("gpt", "bert", "t5"),
        help="of which model: by default that of --architecture or the file; a T5 cannot be trained yet",
    )
    parser.add_argument("--decoder-seq-length", type=positive, metavar="N", help="tokens of T5's decoder")
    parser.add_argument("--json", action="store_true", help="print one object, as JSON")
    return parser


def read_config(flags: list[str], world_size: int | None, samples: str | None) -> tuple[Config, int]:
    """The configuration of the run, checked, and its number of processes.

    Raises:
        ValueError: the flags leave the number of samples open, or ask for none.
        SystemExit: they do not fit together.
    """
    # The encoder of a T5 reads masked sentences, as a BERT does.
    architecture = "bert" if samples == "t5" else samples
    config = parse_arguments(flags, prog=PROGRAM, description=DESCRIPTION, architecture=architecture)
    parallel, training = config.parallel, config.training
    one_copy = max(1, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    problems = validate(config, world_size or one_copy)
    if problems:
        stop(PROGRAM, list(map(str, problems)))
    if config.data.mock_data:
        raise ValueError("--mock-data makes its samples up as they are read: there are no indices to build.")
    if world_size is None and training.global_batch_size is None:
        raise ValueError(
            "How many samples the run reads follows from the global batch, which is a micro-batch of "
            f"{training.micro_batch_size} on each data parallel rank: give --world-size, a multiple of {one_copy}, or "
            "--global-batch-size as the run will."
        )
    return config, world_size or one_copy


def decoder_length(options: argparse.Namespace) -> int | None:
    """Tokens of T5's decoder; None for other samples. Raises ValueError where it is given for those, or not for T5."""
    length: int | None = options.decoder_seq_length
    if (options.samples == "t5") == (length is not None):
        return length
    raise ValueError(
        "Samples of T5 need --decoder-seq-length, the tokens of the decoder."
        if length is None
        else "--decoder-seq-length is for --samples t5."
    )


def describe_part(dataset: Part) -> Built:
    if isinstance(dataset, MaskedDataset):
        return Built(dataset.path_prefix, len(dataset), None, dataset.sample_index.nbytes, dataset.build_seconds)
    indices = dataset.document_index, dataset.sample_index, dataset.shuffle_index
    size = sum(array.nbytes for array in indices)
    return Built(dataset.path_prefix, len(dataset), dataset.num_epochs, size, dataset.build_seconds)


def describe(name: str, source: SampleSource, sequence_length: int) -> Split:
    """What was built for a split."""
    if isinstance(source, BlendedDataset):
        size = source.dataset_index.nbytes + source.dataset_sample_index.nbytes
        blend = Built(None, len(source), None, size, source.build_seconds)
        built = [*map(describe_part, source.datasets), blend]
    else:
        assert isinstance(source, GPTDataset | MaskedDataset), f"{type(source).__name__} has no indices"
        built = [describe_part(source)]
    return Split(name, len(source), len(source) * sequence_length, built)


def describe_all(datasets: Datasets, sequence_length: int) -> list[Split]:
    splits = {"training": datasets.train}
    splits |= {f"validation {name}".strip(): valid for name, valid in datasets.valid.items()}
    if datasets.test is not None:
        splits["test"] = datasets.test
    return [describe(name, source, sequence_length) for name, source in splits.items()]


def sentence(split: Split) -> str:
    """One line about a split."""
    parts = [built for built in split.datasets if built.path_prefix is not None]
    epochs = sorted({built.epochs for built in parts if built.epochs is not None})
    times = "masked" if not epochs else f"{epochs[0]} epoch{'s' * (epochs[0] > 1)}"
    if len(epochs) > 1:
        times = f"{epochs[0]} to {epochs[-1]} epochs"
    of = "" if len(parts) == 1 else f" of {len(parts)} datasets"
    size = sum(built.bytes for built in split.datasets)
    new = [built.build_seconds for built in split.datasets if built.build_seconds is not None]
    state = f"built in {sum(new):.3f} s" if new else "there already"
    if 0 < len(new) < len(split.datasets):
        state = f"{len(new)} of {len(split.datasets)} {state}, the others there already"
    return (
        f"{split.name:{NAME_WIDTH}} {split.samples:,} samples, {split.tokens:,} tokens: {times}{of}; "
        f"indices of {size / 1e6:,.3f} MB, {state}"
    )


def report(splits: list[Split], folder: str, notes: tuple[str, ...], seconds: float) -> None:
    for split in splits:
        print(sentence(split))
    for note in notes:
        print(note)
    num_new = sum(built.build_seconds is not None for split in splits for built in split.datasets)
    print(f"{folder} holds all that the run needs; {num_new} indices are new ({seconds:.2f} s)")


def build(flags: list[str], options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    config, world_size = read_config(flags, options.world_size, options.samples)
    tokenizer = build_tokenizer_of(config)
    config = with_vocabulary(config, tokenizer, world_size)
    with tqdm(unit=" datasets", disable=None, file=sys.stderr) as bar:
        datasets = build_datasets(config, tokenizer, lambda: bar.update() and None, decoder_length(options))
    splits = describe_all(datasets, config.data.seq_length)
    first = datasets.train.datasets[0] if isinstance(datasets.train, BlendedDataset) else datasets.train
    assert isinstance(first, GPTDataset | BERTDataset | T5Dataset), f"{type(first).__name__} has no indices"
    assert first.settings.cache_path, "indices lie in a folder"
    folder, seconds = str(Path(first.settings.cache_path).absolute()), time.perf_counter() - begin
    if not options.json:
        report(splits, folder, datasets.notes, seconds)
        return
    answer: dict[str, Any] = {
        "cache_path": folder,
        "seconds": round(seconds, 3),
        "notes": list(datasets.notes),
        "splits": [asdict(split) for split in splits],
    }
    print(json.dumps(answer, indent=2))


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    # The other flags are the run's, which its own parser reads.
    options, flags = parser.parse_known_args(arguments)
    parser.run(lambda: build(flags, options))


if __name__ == "__main__":
    main()
