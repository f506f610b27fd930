"""Preprocessing per CPU-second: our whole command against the tokenizer library alone; and two workers against one.

    python benchmarks/preprocess.py --text TEXT.jsonl ... [--huggingface tokenizer.json] [--sentencepiece FILE.model]
        [--tiktoken RANKS.tiktoken] [--bert vocab.txt] [--gpt2 FOLDER] [--output [FILE]]

For each tokenizer that is given:

- the library alone: a fresh process of one thread encodes texts that are parsed already and held in memory, in the
  library's own fastest way; only the CPU time of encoding counts;
- our command: `tools/preprocess_data.py --workers 1` in a process of its own, with reading, checking, parsing, encoding
  and writing, and the CPU time of all its processes. What the same command takes for one short document, its start-up,
  is told apart and subtracted;
- the ids in the `.bin` must be the library's; those made with gigatoken the ids of the library that it stands for;
- the wall time of one worker over that of two, start-up subtracted from both. It says little on a busy machine: the
  share of two cores that the job got is told beside it.

Both take turns; the medians of the repetitions stand, with the range of the ratios. Megabytes are 10^6 bytes of text
as UTF-8, without the JSON around it. Where gigatoken is installed it is measured as a library of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, machine, write

ROOT = Path(__file__).parents[1]
DEFAULT_OUTPUT = RESULTS / "preprocess.json"
# Texts that are handed to a library at once, where it takes several.
BATCH = 256
# How tiktoken cuts text into words, and the special tokens behind the ranks of a file.
PATTERN, SPECIAL_TOKENS = "cl100k", ("<|endoftext|>",)


@dataclass(frozen=True)
class Contender:
    """A library, the flags that make our command use it, and its file.

    Attributes: `name`; `library` and `reference`, the one whose ids count, keys of LIBRARIES; `path`; `flags`.
    """

    name: str
    library: str
    reference: str
    path: Path
    flags: list[str]

    @property
    def fast(self) -> bool:
        """Whether it gets the long text."""
        return self.library == "gigatoken"


Encode = Callable[[Sequence[str]], list[np.ndarray]]


def huggingface(path: Path) -> Encode:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(path))
    library.no_truncation()
    library.no_padding()

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        batches = (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))
        return [np.array(one.ids, np.int32) for batch in batches for one in library.encode_batch_fast(list(batch))]

    return encode


def wordpiece(path: Path) -> Encode:
    """BERT's own way with a vocabulary: lower case, WordPiece, no special tokens."""
    from tokenizers import BertWordPieceTokenizer

    library = BertWordPieceTokenizer(str(path), lowercase=True)
    library.post_processor = None

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        batches = (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))
        return [
            np.array(one.ids, np.int32)
            for batch in batches
            for one in library._tokenizer.encode_batch_fast(list(batch), add_special_tokens=False)
        ]

    return encode


def gpt2(path: Path) -> Encode:
    from tokenizers import ByteLevelBPETokenizer

    library = ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        batches = (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))
        return [
            np.array(one.ids, np.int32)
            for batch in batches
            for one in library._tokenizer.encode_batch_fast(list(batch))
        ]

    return encode


def sentencepiece(path: Path) -> Encode:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(path))
    return lambda texts: [np.array(library.encode(text), np.int32) for text in texts]


def tiktoken(path: Path) -> Encode:
    from megallm.data.tokenizer.base import TokenizerSettings
    from megallm.data.tokenizer.build import build_tokenizer

    library = build_tokenizer(
        TokenizerSettings("TikTokenizer", str(path), tiktoken_pattern=PATTERN, tiktoken_special_tokens=SPECIAL_TOKENS)
    )._library
    return lambda texts: [np.array(library.encode_ordinary(text), np.int32) for text in texts]


def gigatoken(path: Path) -> Encode:
    from gigatoken import Tokenizer

    library = (Tokenizer.from_sentencepiece(path) if path.suffix == ".model" else Tokenizer(path)).backend
    return lambda texts: [library.encode(text) for text in texts]


LIBRARIES: dict[str, Callable[[Path], Encode]] = {
    "tokenizers": huggingface,
    "tokenizers WordPiece": wordpiece,
    "tokenizers GPT-2": gpt2,
    "sentencepiece": sentencepiece,
    "tiktoken": tiktoken,
    "gigatoken": gigatoken,
}


def contenders(arguments: argparse.Namespace) -> Iterator[Contender]:
    """Those whose files were given; says which are left out."""
    given = [
        (arguments.huggingface, "tokenizers", "HuggingFaceTokenizer", "--tokenizer-model", True),
        (arguments.sentencepiece, "sentencepiece", "SentencePieceTokenizer", "--tokenizer-model", True),
        (arguments.tiktoken, "tiktoken", "TikTokenizer", "--tokenizer-model", False),
        (arguments.bert, "tokenizers WordPiece", "BertWordPieceLowerCase", "--vocab-file", False),
        (arguments.gpt2, "tokenizers GPT-2", "GPT2BPETokenizer", "--tokenizer-model", False),
    ]
    for path, library, kind, flag, read_by_gigatoken in given:
        if path is None:
            print(f"{library}: left out, no file is given")
            continue
        flags = ["--tokenizer-type", kind, flag, str(path)]
        if library == "tiktoken":
            flags += ["--tiktoken-pattern", PATTERN, "--tiktoken-special-tokens", *SPECIAL_TOKENS]
        yield Contender(library, library, library, path, [*flags, "--fast-tokenizer", "never"])
        if not read_by_gigatoken:
            continue
        if find_spec("gigatoken") is None:
            print(f"gigatoken, {path.name}: left out, it is not installed")
            continue
        name = f"gigatoken {'SentencePiece' if path.suffix == '.model' else 'byte-level'}"
        yield Contender(name, "gigatoken", library, path, [*flags, "--fast-tokenizer", "always"])


def texts_of(path: Path) -> list[str]:
    with open(path, "rb") as file:
        return [json.loads(line)["text"] for line in file]


def encode_alone(library: str, path: Path, text: Path, ids: Path, answers: Any) -> None:
    """In a process of its own: CPU seconds that encoding takes; the ids go to a file as int32."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = texts_of(text)
    encode = LIBRARIES[library](path)
    began = time.process_time()
    encoded = encode(texts)
    seconds = time.process_time() - began
    np.concatenate(encoded).astype("<i4").tofile(ids)
    answers.put(seconds)


def library_alone(library: str, path: Path, text: Path, ids: Path) -> float:
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=encode_alone, args=(library, path, text, ids, answers))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{library} failed"
    return float(answers.get())


@dataclass(frozen=True)
class Run:
    """What a command took, in seconds: `cpu` of all its processes, and `wall`."""

    cpu: float
    wall: float

    def __sub__(self, other: Run) -> Run:
        return Run(self.cpu - other.cpu, self.wall - other.wall)


def our_command(contender: Contender, text: Path, folder: Path, workers: int) -> Run:
    """Run the tool; its output stays in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(text)]
    command += ["--output-prefix", str(folder / "out"), "--workers", str(workers), *contender.flags]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    messages = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    assert status == 0, messages.decode()
    return Run(usage.ru_utime + usage.ru_stime, wall)


def same_ids(ids: Path, folder: Path) -> bool:
    index = next(folder.glob("out_*.idx")).read_bytes()
    # The code of the dtype stands after magic and version: 8 for uint16, 4 for int32.
    dtype = {8: "<u2", 4: "<i4"}[index[17]]
    ours = np.fromfile(next(folder.glob("out_*.bin")), dtype)
    return np.array_equal(ours, np.fromfile(ids, "<i4"))


def measure(contender: Contender, text: Path, megabytes: float, repetitions: int, folder: Path) -> dict[str, Any]:
    short = folder / "short.jsonl"
    short.write_text('{"text": "one short document"}\n')
    alone: list[float] = []
    runs: dict[str, list[Run]] = {"start": [], "start of two": [], "one": [], "two": []}
    library_alone(contender.reference, contender.path, text, folder / "reference")
    for _ in range(repetitions):
        runs["start"].append(our_command(contender, short, folder / "short", 1))
        runs["start of two"].append(our_command(contender, short, folder / "short", 2))
        alone.append(library_alone(contender.library, contender.path, text, folder / "ids"))
        runs["one"].append(our_command(contender, text, folder / "one", 1))
        runs["two"].append(our_command(contender, text, folder / "two", 2))
        assert same_ids(folder / "reference", folder / "one"), f"{contender.name}: other ids than the library's"
        for name in ("out_text_document.bin", "out_text_document.idx"):
            assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), "workers change bytes"
    start = Run(*(statistics.median(getattr(run, kind) for run in runs["start"]) for kind in ("cpu", "wall")))
    start_of_two = statistics.median(run.wall for run in runs["start of two"])
    work = [run - start for run in runs["one"]]
    ratios = [library / run.cpu for library, run in zip(alone, work, strict=True)]
    walls = [one.wall / (two.wall - start_of_two) for one, two in zip(work, runs["two"], strict=True)]
    median = statistics.median
    return {
        "megabytes": round(megabytes, 1),
        "library_alone_mb_per_cpu_second": round(megabytes / median(alone), 2),
        "our_command_mb_per_cpu_second": round(megabytes / median(run.cpu for run in work), 2),
        "our_command_with_start_up_mb_per_cpu_second": round(megabytes / median(run.cpu for run in runs["one"]), 2),
        "ratio": round(median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "start_up_cpu_seconds": round(start.cpu, 2),
        "start_up_wall_seconds": round(start.wall, 2),
        "two_workers_wall_ratio": round(median(walls), 2),
        "two_workers_wall_ratio_max": round(max(walls), 2),
        "two_workers_cores_used": round(median(run.cpu / run.wall for run in runs["two"]), 2),
        "two_workers_mb_per_cpu_second": round(megabytes / median(run.cpu for run in runs["two"]), 2),
        "same_ids": True,
    }


def cut_text(sources: Sequence[Path], megabytes: float, target: Path) -> float:
    """The first documents of the sources, up to so much text; gives their megabytes."""
    size = 0
    with open(target, "wb") as file:
        for source in sources:
            with open(source, "rb") as lines:
                for line in lines:
                    if size >= megabytes * 1e6:
                        return size / 1e6
                    size += len(json.loads(line)["text"].encode())
                    file.write(line)
    return size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of JSON lines, text under 'text'")
    parser.add_argument("--huggingface", type=Path, help="a tokenizer.json")
    parser.add_argument("--sentencepiece", type=Path, help="a SentencePiece .model")
    parser.add_argument("--tiktoken", type=Path, help="a .tiktoken file")
    parser.add_argument("--bert", type=Path, help="a vocab.txt")
    parser.add_argument("--gpt2", type=Path, help="a folder with vocab.json and merges.txt")
    parser.add_argument("--megabytes", type=float, default=12, help="text for each library (default: %(default)s)")
    parser.add_argument("--fast-megabytes", type=float, default=200, help="text for gigatoken (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these contenders only")
    parser.add_argument(
        "--output",
        type=Path,
        nargs="?",
        const=DEFAULT_OUTPUT,
        help=f"write JSON (to {DEFAULT_OUTPUT.name} in results/); contenders that are not measured keep their figures",
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    record: dict[str, Any] = {}
    if arguments.output and arguments.output.exists():
        record = json.loads(arguments.output.read_text())
    record.update(machine=machine(), repetitions=arguments.repetitions)
    record.setdefault("contenders", {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for contender in contenders(arguments):
            if arguments.only and contender.name not in arguments.only:
                continue
            text = folder / "text.jsonl"
            size = cut_text(arguments.text, arguments.fast_megabytes if contender.fast else arguments.megabytes, text)
            result = measure(contender, text, size, arguments.repetitions, folder)
            record["contenders"][contender.name] = result
            print(
                f"{contender.name}: alone {result['library_alone_mb_per_cpu_second']}, our command "
                f"{result['our_command_mb_per_cpu_second']} MB per CPU second, ratio {result['ratio']:.2f} "
                f"({result['ratio_min']:.2f} to {result['ratio_max']:.2f}); start-up "
                f"{result['start_up_wall_seconds']} s; two workers {result['two_workers_wall_ratio']} times as fast "
                f"({result['two_workers_cores_used']} cores used)",
                flush=True,
            )
    if arguments.output:
        write(arguments.output, record)


if __name__ == "__main__":
    main()
