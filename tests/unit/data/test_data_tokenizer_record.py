"""The record beside a dataset notices another tokenizer, and only another one."""

import json

import pytest

from megallm.data.tokenizer.base import TokenizerSettings
from megallm.data.tokenizer.build import build_tokenizer
from megallm.data.tokenizer.record import check_record, describe, read_record, record_path, write_record


@pytest.fixture
def tokenizer(tokenizer_json):
    return build_tokenizer(TokenizerSettings("HuggingFaceTokenizer", str(tokenizer_json)))


@pytest.fixture
def prefix(tmp_path, tokenizer):
    prefix = str(tmp_path / "books.v1_text_document")
    assert write_record(prefix, describe(tokenizer)) == record_path(prefix)
    return prefix


def other(tokenizer_json, folder, change):
    """A tokenizer from the same file with a change of its text."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(change(tokenizer_json.read_text()))
    return build_tokenizer(TokenizerSettings("HuggingFaceTokenizer", str(folder)))


def test_what_is_written_is_read(prefix, tokenizer, tmp_path):
    record = read_record(prefix)
    assert record == describe(tokenizer)
    assert record["special_tokens"] == {"end of document": {"text": "<|endoftext|>", "id": 0}}
    assert (record["kind"], record["vocab_size"]) == ("tokenizers", 300)
    assert record["library"].startswith("tokenizers ")
    assert record["checksum"].startswith("sha256:")
    assert [path.name for path in tmp_path.iterdir()] == ["books.v1_text_document.tokenizer.json"]


def test_the_same_tokenizer_passes_wherever_it_lies_and_however_its_file_is_laid_out(prefix, tokenizer_json, tmp_path):
    def move(text):
        content = json.loads(text)
        content["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        return json.dumps(content)

    check_record(prefix, other(tokenizer_json, tmp_path / "moved", move))


def test_a_dataset_without_a_record_passes(tmp_path, tokenizer):
    assert read_record(tmp_path / "x") is None
    check_record(tmp_path / "x", tokenizer)


def test_another_tokenizer_is_refused_and_both_are_named(prefix, tokenizer_json, sentencepiece_model, tmp_path):
    merges = json.loads(tokenizer_json.read_text())["model"]["merges"]

    def swap(text):
        content = json.loads(text)
        content["model"]["merges"] = [merges[1], merges[0], *merges[2:]]
        return json.dumps(content)

    def rename(text):
        return text.replace("<|endoftext|>", "</s>")

    null = TokenizerSettings("NullTokenizer", vocab_size=300)
    cases = [
        (other(tokenizer_json, tmp_path / "swapped", swap), "the same size, but other content"),
        (other(tokenizer_json, tmp_path / "renamed", rename), "end of document <|endoftext|> = 0 there, </s> = 0 here"),
        (build_tokenizer(null), "kind tokenizers there, null here; vocabulary 300 there, 301 here"),
        (
            build_tokenizer(TokenizerSettings("Llama2Tokenizer", str(sentencepiece_model))),
            "kind tokenizers there, sentencepiece here",
        ),
    ]
    for tokenizer, difference in cases:
        with pytest.raises(ValueError, match="was made with another tokenizer than this run's") as told:
            check_record(prefix, tokenizer)
        message = str(told.value)
        assert difference in message
        assert str(tokenizer_json) in message
        assert (tokenizer.source or "null") in message


def test_names_of_one_kind_are_one_tokenizer(sentencepiece_model, tmp_path):
    kinds = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    records = [describe(build_tokenizer(TokenizerSettings(kind, str(sentencepiece_model)))) for kind in kinds]
    assert records[0] == records[1] == records[2]
    extended = build_tokenizer(TokenizerSettings("SentencePieceTokenizer", str(sentencepiece_model), vocab_extra_ids=3))
    write_record(tmp_path / "x", records[0])
    with pytest.raises(ValueError, match="kind sentencepiece there, sentencepiece with appended tokens here"):
        check_record(tmp_path / "x", extended)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"kind": "x"}', '{"kind": 1, "checksum": 2, "vocab_size": 3, "special_tokens": {}}']
)
def test_a_broken_record_is_named(tmp_path, tokenizer, content):
    record_path(tmp_path / "x").write_text(content)
    with pytest.raises(ValueError, match=r"x\.tokenizer\.json is no (JSON|record of a tokenizer)"):
        check_record(tmp_path / "x", tokenizer)


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(TypeError):
        write_record(tmp_path / "x", {"kind": object()})
    assert list(tmp_path.iterdir()) == []
