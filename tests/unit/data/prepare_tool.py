"""What the tests of preprocessing share: its arguments, and a slow reference straight from the format's description."""

import struct
from pathlib import Path

from tokenizers import Tokenizer

from megallm.data.prepare.job import Job
from megallm.data.prepare.progress import Progress
from megallm.data.text.sentences import split_sentences


def arguments(tokenizer_json, prefix, *inputs):
    return [
        *("--input", *inputs, "--output-prefix", prefix, "--fast-tokenizer", "never"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_json),
    ]


def run_job(settings, workers):
    return Job(settings).run(workers, Progress())


def files_of(prefix):
    """Content of the .bin and of the .idx file."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def slow_reference(values, tokenizer_json, append_eod=False, sentences=False, keep_newlines=False):
    """Both files, for the text or the list of texts of each document."""
    library = Tokenizer.from_file(str(tokenizer_json))
    flat, lengths, ends = [], [], [0]
    for value in values:
        texts = value if isinstance(value, list) else [value]
        if sentences:
            texts = [part for text in texts for part in split_sentences(text, "english", keep_newlines)]
        ids = [library.encode(text).ids for text in texts]
        ids = [part for part in ids if part]
        if ids and append_eod:
            ids[-1].append(library.token_to_id("<|endoftext|>"))
        flat += [token for part in ids for token in part]
        lengths += map(len, ids)
        ends.append(len(lengths))
    offsets = [2 * sum(lengths[:number]) for number in range(len(lengths))]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(ends))
    index = struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(ends)}q", *lengths, *offsets, *ends)
    return struct.pack(f"<{len(flat)}H", *flat), header + index
