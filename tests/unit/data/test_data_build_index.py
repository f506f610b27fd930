"""build_index: the run finds everything, whatever happened while it was built."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from slow_masking import write_sentences
from small_data import TOOLS, load_tool, write_dataset

from megallm.data.samples import gpt, index_cache, masked
from megallm.data.samples.bert import BERTDataset
from megallm.data.samples.t5 import T5Dataset
from megallm.train.datasets import build_datasets, build_tokenizer_of, with_vocabulary

SHAPE = [
    *("--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "16"),
    *("--micro-batch-size", "2", "--lr", "1e-3", "--train-iters", "6", "--eval-interval", "3", "--eval-iters", "2"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "99", "--split", "6,3,1"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def data(tmp_path):
    """Prefixes of two datasets."""
    generator = np.random.default_rng(1)
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [generator.integers(0, 99, length) for length in generator.integers(1, 40, 200)])
    return str(tmp_path / "a"), str(tmp_path / "b")


def flags(cache, *paths, batch=("--global-batch-size", "4")):
    return [*SHAPE, *batch, "--data-cache-path", str(cache), "--data-path", *paths]


def build(capsys, *arguments):
    """What the tool answers in JSON."""
    load_tool("build_index").main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    """The sentence with which the tool ends."""
    with pytest.raises(SystemExit) as ended:
        load_tool("build_index").main(list(arguments))
    assert ended.value.code == 2, ended.value
    return capsys.readouterr().err


def refuse_to_build(monkeypatch):
    def fail(*_):
        raise AssertionError("an index is built")

    monkeypatch.setattr(gpt, "build_sample_order", fail)
    monkeypatch.setattr("megallm.data.samples.helpers.build_blending_indices", fail)
    monkeypatch.setattr("megallm.data.samples.helpers.build_exhaustive_blending_indices", fail)


def state_of(cache):
    """Every file of a folder with its inode and time."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(cache).rglob("*.np*")}


@pytest.mark.parametrize("blend", ["one", "weights", "without weights", "surplus"])
def test_the_run_finds_what_was_built(tmp_path, capsys, monkeypatch, data, blend):
    weights = ("0.3", data[0], "0.7", data[1])
    arguments = flags(tmp_path / "cache", *{"one": data[:1], "without weights": data}.get(blend, weights))
    if blend == "surplus":
        arguments += ["--mid-level-dataset-surplus", "0.5"]
    built = build(capsys, *arguments)
    entries = [entry for split in built["splits"] for entry in split["datasets"]]
    assert [split["name"] for split in built["splits"]] == ["training", "validation", "test"]
    # Two blends of the same size and weights have one order.
    assert all(entry["build_seconds"] is not None for entry in entries if entry["path_prefix"]), entries
    assert Path(built["cache_path"]) == tmp_path / "cache"

    refuse_to_build(monkeypatch)
    config, _ = load_tool("build_index").read_config(arguments, None, None)
    found = build_datasets(config, build_tokenizer_of(config))
    assert len(found.train) == built["splits"][0]["samples"]
    again = build(capsys, *arguments)
    assert all(entry["build_seconds"] is None for split in again["splits"] for entry in split["datasets"]), again


@pytest.mark.slow
def test_a_run_of_the_training_program_builds_nothing(tmp_path, capsys, data):
    arguments = flags(tmp_path / "cache", "0.4", data[0], "0.6", data[1])
    build(capsys, *arguments)
    before = state_of(tmp_path / "cache")
    program = TOOLS.parent / "pretrain_gpt.py"
    run = subprocess.run([sys.executable, program, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(before) > 0 and state_of(tmp_path / "cache") == before


def test_what_is_said_is_true(tmp_path, capsys, data):
    arguments = flags(tmp_path / "cache", data[0])
    built = build(capsys, *arguments)
    config, _ = load_tool("build_index").read_config(arguments, None, None)
    datasets = build_datasets(config, build_tokenizer_of(config))
    for split, dataset in zip(built["splits"], (datasets.train, datasets.valid[""], datasets.test), strict=True):
        (entry,) = split["datasets"]
        assert entry["samples"] == split["samples"] == len(dataset)
        assert split["tokens"] == len(dataset) * 16
        first, last = dataset._range
        assert np.all(np.bincount(dataset.document_index, minlength=last)[first:last] == entry["epochs"])
        arrays = (dataset.document_index, dataset.sample_index, dataset.shuffle_index)
        assert entry["bytes"] == sum(array.nbytes for array in arrays)
    assert built["splits"][1]["datasets"][0]["epochs"] == 1
    load_tool("build_index").main(arguments)
    said = capsys.readouterr().out
    assert f"{len(datasets.train):,} samples" in said
    assert said.count("there already") == 3
    assert "0 indices are new" in said


def test_a_part_that_is_missing_is_built_and_told(tmp_path, capsys, data):
    arguments = flags(tmp_path / "cache", "1", data[0], "2", data[1])
    build(capsys, *arguments)
    longer = ["100" if argument == "6" else argument for argument in arguments]
    load_tool("build_index").main(longer)
    training, _, test, *_ = capsys.readouterr().out.splitlines()
    assert " epochs of 2 datasets" in training and "built in" in training
    assert test.endswith("there already")


def test_several_validation_sets_have_a_line_each(tmp_path, capsys, data):
    arguments = [*SHAPE, "--global-batch-size", "4", "--data-cache-path", str(tmp_path / "cache")]
    del arguments[arguments.index("--split") : arguments.index("--split") + 2]
    lists = ["--train-data-path", data[0], "--valid-data-path", *data, "--multiple-validation-sets"]
    built = build(capsys, *arguments, *lists)
    assert [split["name"] for split in built["splits"]] == ["training", "validation a", "validation b"]


def test_the_number_of_processes_settles_the_batch(tmp_path, capsys, data):
    open_batch = flags(tmp_path / "cache", data[0], batch=())
    said = refusal(capsys, *open_batch)
    assert "--world-size" in said and "--global-batch-size" in said
    by_size = build(capsys, *open_batch, "--world-size", "8", "--tensor-model-parallel-size", "2")
    by_batch = build(capsys, *open_batch, "--global-batch-size", "8")
    assert by_size["splits"][0]["samples"] == by_batch["splits"][0]["samples"]
    assert all(entry["build_seconds"] is None for split in by_batch["splits"] for entry in split["datasets"])
    said = refusal(capsys, *open_batch, "--world-size", "3", "--tensor-model-parallel-size", "2")
    assert "3 processes" in said


def test_mistakes_are_sentences(tmp_path, capsys, data):
    cache = tmp_path / "cache"
    assert "--num-layers" in refusal(capsys)
    assert "no indices to build" in refusal(capsys, *SHAPE, "--global-batch-size", "4", "--mock-data")
    assert "does not exist" in refusal(capsys, *flags(cache, str(tmp_path / "absent")))
    assert "--data-pat" in refusal(capsys, *flags(cache, data[0]), "--data-pat", "x")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(capsys, *flags(tmp_path / "file", data[0]))
    assert not cache.exists()


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch, data):
    usage = index_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(index_cache.shutil, "disk_usage", lambda path: usage._replace(free=100))
    said = refusal(capsys, *flags(tmp_path / "cache", data[0]))
    assert "are needed" in said and "are free" in said
    assert not state_of(tmp_path / "cache")


@pytest.fixture
def sentences(tmp_path):
    """Flags of a vocabulary of BERT, and of two datasets of sentences."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{'##' * (number % 2)}w{number}" for number in range(50))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    generator = np.random.default_rng(2)
    for name in ("a", "b"):
        documents = [[generator.integers(5, 55, generator.integers(1, 9)) for _ in range(5)] for _ in range(80)]
        write_sentences(tmp_path / name, [[sentence.tolist() for sentence in document] for document in documents])
    tokenizer = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(tmp_path / "vocab.txt")]
    shape = [word for word in SHAPE if word not in ("--tokenizer-type", "NullTokenizer", "--vocab-size", "99")]
    return [*shape, *tokenizer, "--vocab-extra-ids", "20", "--global-batch-size", "4", "--seq-length", "20"]


@pytest.mark.parametrize(
    ("model", "extra", "blend"),
    [("bert", [], False), ("bert", ["--bert-no-binary-head"], True), ("t5", ["--decoder-seq-length", "8"], True)],
)
def test_masked_samples_are_built_ahead(tmp_path, capsys, monkeypatch, sentences, model, extra, blend):
    """The datasets that a run would read find their rows; those of other lengths do not."""
    paths = ["0.3", str(tmp_path / "a"), "0.7", str(tmp_path / "b")] if blend else [str(tmp_path / "a")]
    arguments = [*sentences, "--data-cache-path", str(tmp_path / "cache"), "--data-path", *paths]
    built = build(capsys, "--samples", model, *extra, *arguments)
    assert [split["name"] for split in built["splits"]] == ["training", "validation", "test"]
    parts = [part for split in built["splits"] for part in split["datasets"] if part["path_prefix"]]
    assert all(part["build_seconds"] is not None and part["epochs"] is None for part in parts)

    def fail(*_):
        raise AssertionError("an index is built")

    monkeypatch.setattr(masked, "build_sentence_mapping", fail)
    tool = load_tool("build_index")
    options, flags_of_run = tool.build_parser().parse_known_args(["--samples", model, *extra, *arguments])
    config, world_size = tool.read_config(flags_of_run, None, model)
    tokenizer = build_tokenizer_of(config)
    config = with_vocabulary(config, tokenizer, world_size)
    found = build_datasets(config, tokenizer, decoder_seq_length=options.decoder_seq_length)
    assert isinstance(
        (found.train.datasets if blend else [found.train])[0], BERTDataset if model == "bert" else T5Dataset
    )
    assert len(found.train) == built["splits"][0]["samples"]
    assert found.content
    other = replace(config, data=replace(config.data, short_seq_prob=0.5))
    with pytest.raises(AssertionError, match="an index is built"):
        build_datasets(other, tokenizer, decoder_seq_length=options.decoder_seq_length)


def test_a_line_about_masked_samples(tmp_path, capsys, sentences):
    load_tool("build_index").main(["--samples", "bert", *sentences, "--data-path", str(tmp_path / "a")])
    out = capsys.readouterr().out
    assert "masked; indices of" in out.splitlines()[0]
    assert "cache/BERTMaskedWordPieceDataset_indices holds all" in out


def test_mistakes_with_masked_samples_are_sentences(tmp_path, capsys, data, sentences):
    plain = flags(tmp_path / "cache", data[0])
    assert "--mask-prob: this is for BERT" in refusal(capsys, *plain, "--mask-prob", "0.2")
    short = [*sentences, "--data-path", str(tmp_path / "a")]
    t5 = ("--samples", "t5", *short)
    assert "need --decoder-seq-length" in refusal(capsys, *t5)
    assert (
        "the vocabulary has no sentinel"
        in refusal(capsys, *t5, "--decoder-seq-length", "8", "--vocab-extra-ids", "0").lower()
    )
    assert "--decoder-seq-length is for --samples t5" in refusal(capsys, *plain, "--decoder-seq-length", "8")
    assert "BERT's samples need [CLS]" in refusal(capsys, "--samples", "bert", *plain)
    assert "--mask-prob: 2.0 is out of range" in refusal(capsys, "--samples", "bert", *short, "--mask-prob", "2")
    write_dataset(tmp_path / "whole", [[1, 2, 3]] * 50)
    said = refusal(capsys, "--samples", "bert", *sentences, "--data-path", str(tmp_path / "whole"))
    assert "preprocess the text with --split-sentences" in said


def start(cache, *paths):
    command = [sys.executable, TOOLS / "build_index.py", *flags(cache, *paths), "--json"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def entries_of(process):
    """What a process that has ended well built: the prefixes, or None for the order of a blend."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return [entry for split in json.loads(out)["splits"] for entry in split["datasets"]]


@pytest.mark.slow
def test_several_at_once_build_each_index_once(tmp_path, data):
    """Two jobs that share a dataset, started together on several nodes each."""
    cache = tmp_path / "cache"
    blend = ("1", data[0], "2", data[1])
    jobs = [start(cache, *(blend if number % 2 else data[:1])) for number in range(4)]
    told = [entry for job in jobs for entry in entries_of(job)]
    built = [entry for entry in told if entry["build_seconds"] is not None]
    # The job with one dataset builds three, the other six and the order of its blends.
    assert sum(entry["path_prefix"] is not None for entry in built) == 3 + 6, built
    assert not any((cache / ".building").iterdir())


@pytest.mark.slow
def test_killed_at_any_moment_the_next_one_completes_it(tmp_path):
    generator = np.random.default_rng(2)
    prefix = tmp_path / "long"
    write_dataset(prefix, [generator.integers(0, 99, 8) for _ in range(100_000)])
    whole = start(tmp_path / "whole", str(prefix))
    wanted = entries_of(whole)
    chance = random.Random(3)
    cache = tmp_path / "cache"
    working = cache / ".building"
    working.mkdir(parents=True)
    for _ in range(3):
        before = working.stat().st_mtime_ns
        victim = start(cache, str(prefix))
        # The imports take most of the time: the moments are counted from when the tool reaches the folder.
        while working.stat().st_mtime_ns == before and victim.poll() is None:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.02))
        victim.kill()
        victim.communicate()
    found = entries_of(start(cache, str(prefix)))
    assert [entry["bytes"] for entry in found] == [entry["bytes"] for entry in wanted]
    assert not any(working.iterdir())
    for path in sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.npy")):
        assert (cache / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path
