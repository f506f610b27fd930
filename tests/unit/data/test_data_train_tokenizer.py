"""Every kind of tokenizer that is trained can be loaded, is measured on what it did not see, and says what is wrong."""

import json

import pytest
from small_data import TEXTS

from megallm.data.tokenizer.base import TokenizerSettings
from megallm.data.tokenizer.build import build_tokenizer
from megallm.data.tokenizer.training import TRAINED_KINDS, TrainingSettings, train_tokenizer

ODD_TEXTS = [
    "",
    "  two  blanks\n\n\tand a tab ",
    "\x00\x07\x7f",
    "naïve 你好 🦊 e\u0301",
    "a<|endoftext|>b</s>[SEP]<mark>",
]


@pytest.fixture
def jsonl(tmp_path):
    """300 documents, one of them empty, one a list of texts, and some blank lines."""
    records = [{"text": TEXTS[number % 4] * (number % 3 + 1)} for number in range(300)]
    records[7]["text"] = ""
    records[8]["text"] = ["one", "", "two"]
    path = tmp_path / "input.jsonl"
    path.write_text("\n \n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def output_name(kind):
    return "out.model" if kind.startswith("sentencepiece") else "tokenizer.json"


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_every_kind_is_written_loaded_and_gives_text_back(tool, jsonl, tmp_path, kind):
    output = tmp_path / "folder" / output_name(kind)
    command = ["--input", jsonl, "--type", kind, "--vocab-size", 340, "--special-tokens", "<mark>"]
    code, out, err = tool("train_tokenizer", *command, "--output", output)
    assert code == 0, err
    assert " tokens, from 285 documents\nend of document " in out
    assert "bytes per token on the 15 documents held out" in out
    tokenizer_type = "SentencePieceTokenizer" if kind.startswith("sentencepiece") else "HuggingFaceTokenizer"
    tokenizer = build_tokenizer(TokenizerSettings(tokenizer_type, str(output)))
    assert f"{output}: {tokenizer.vocab_size} tokens" in out
    assert tokenizer.vocab_size <= 340
    mark = tokenizer.encode("<mark>")
    assert any(tokenizer.token_text(token_id) == "<mark>" for token_id in mark)
    if kind != "wordpiece":
        for text in [*ODD_TEXTS, *TEXTS]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_transformers_loads_it_and_gives_the_same_ids(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    output = tmp_path / "tokenizer.json"
    output.write_bytes(train_tokenizer(TrainingSettings(kind, 340), TEXTS * 5, output).content)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(output))
    tokenizer = build_tokenizer(TokenizerSettings("HuggingFaceTokenizer", str(output)))
    for text in [*ODD_TEXTS, *TEXTS]:
        assert tokenizer.encode(text) == reference(text).input_ids


def test_bpe_is_the_same_each_time_and_ends_documents_with_id_0(tool, jsonl, tmp_path):
    command = ["--input", jsonl, "--vocab-size", 290]
    for name in ("a", "b"):
        assert tool("train_tokenizer", *command, "--output", tmp_path / f"{name}.json")[0] == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    tokenizer = build_tokenizer(TokenizerSettings("HuggingFaceTokenizer", str(tmp_path / "a.json")))
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (0, 290)


def test_wordpiece_as_vocab_txt(tool, jsonl, tmp_path):
    vocab = tmp_path / "vocab.txt"
    command = ["--input", jsonl, "--type", "wordpiece", "--lower-case", "--vocab-size", 200]
    assert tool("train_tokenizer", *command, "--output", vocab)[0] == 0
    assert vocab.read_text().split("\n")[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = build_tokenizer(TokenizerSettings("BertWordPieceLowerCase", vocab_file=str(vocab)))
    assert tokenizer.decode(tokenizer.encode("The QUICK fox")) == "the quick fox"


def test_without_byte_fallback_a_new_character_is_unknown(tmp_path):
    output = tmp_path / "out.model"
    for byte_fallback in (True, False):
        settings = TrainingSettings("sentencepiece-bpe", 340 if byte_fallback else 80, byte_fallback=byte_fallback)
        tokenizer = train_tokenizer(settings, TEXTS * 3, output).tokenizer
        assert (0 in tokenizer.encode("𝄞")) is not byte_fallback


def test_sentencepiece_learns_from_lines_with_zero_bytes_and_from_long_ones(tmp_path):
    settings = TrainingSettings("sentencepiece-bpe", 300)
    for texts in (["ab\0cd ef gh"] * 50, ["ab cd ef gh " * 5000]):
        tokenizer = train_tokenizer(settings, texts, tmp_path / "out.model").tokenizer
        assert len(tokenizer.encode("ef gh")) == 2


def test_it_measures_on_what_it_did_not_see(tool, tmp_path):
    """Documents of a's, then one of b's: a trained merge would give more than one byte a token."""
    lines = [json.dumps({"text": "aaaa " * 50})] * 19 + [json.dumps({"text": "bcdbdcbcd"})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    command = ["--input", tmp_path / "in.jsonl", "--vocab-size", 300, "--output", tmp_path / "t.json"]
    code, out, _ = tool("train_tokenizer", *command)
    assert code == 0
    assert "1.000 bytes per token on the 1 documents held out" in out
    assert "The text has no more than that to merge; 300 tokens need more text." in out
    assert "on the 10 documents held out" in tool("train_tokenizer", *command, "--held-out", "0.5")[1]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-bpe"])
def test_bad_documents_are_skipped_shown_and_counted(tool, jsonl, tmp_path, kind):
    """The tokenizer is that of the good documents alone."""
    good = jsonl.read_text()
    (tmp_path / "bad.jsonl").write_text('{"body": 1}\n{"text": "' + "long" * 1000 + '"}\n' + good + '{"text": 5}\n')
    outputs = [tmp_path / f"{name}_{output_name(kind)}" for name in ("bad", "good")]
    held_out = ["--type", kind, "--vocab-size", 400, "--held-out", 0.01, "--on-bad-document", "skip"]
    command = ["--input", tmp_path / "bad.jsonl", *held_out, "--max-document-bytes", 2000, "--output", outputs[0]]
    code, out, err = tool("train_tokenizer", *command)
    assert code == 0
    assert "from 298 documents; 3 bad documents skipped" in out
    assert "on the 2 documents held out" in out
    places = [line.split(":")[1].split(",")[1].strip() for line in err.splitlines() if line.startswith("Skipped")]
    assert places == ["line 1", "line 2", "line 603"]
    lines = [line for line in good.splitlines() if line.strip()]
    (tmp_path / "good.jsonl").write_text("\n".join([*lines[:298], *lines[:3]]))
    command = ["--input", tmp_path / "good.jsonl", *held_out, "--output", outputs[1]]
    assert tool("train_tokenizer", *command)[0] == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    (tmp_path / "all_bad.jsonl").write_text("{}\n{}\n")
    command = ["--input", tmp_path / "all_bad.jsonl", *held_out, "--output", tmp_path / f"all_{output_name(kind)}"]
    code, _, err = tool("train_tokenizer", *command)
    assert (code, "All 1 documents to train on are bad" in err) == (2, True), err
    assert not (tmp_path / f"all_{output_name(kind)}").exists()


def test_mistakes(tool, jsonl, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n{"text": "c"}\n')
    output = ["--output", tmp_path / "t.json"]
    model = ["--output", tmp_path / "t.model", "--type", "sentencepiece-bpe"]
    cases = [
        ([jsonl, "--vocab-size", 100, *output], "256 bytes and <|endoftext|> need 257"),
        ([jsonl, "--vocab-size", 257, "--special-tokens", "<x>", *output], "need 258"),
        ([jsonl, "--vocab-size", 5, "--type", "wordpiece", *output], "there must be words"),
        ([jsonl, "--vocab-size", 100, *model], "256 bytes, <unk>, <s>, </s> and the special tokens need 259"),
        ([jsonl, "--vocab-size", 300, "--lower-case", *output], "--lower-case acts on --type wordpiece only"),
        ([jsonl, "--vocab-size", 300, "--type", "sentencepiece-bpe", *output], "give a name that ends in .model"),
        ([jsonl, "--vocab-size", 300, "--output", tmp_path], "is a folder"),
        ([jsonl, "--vocab-size", 300, "--output", tmp_path / "one.txt" / "x"], "x cannot be written: "),
        ([jsonl, "--vocab-size", 300, "--special-tokens", "a", "a", *output], "must be texts that differ"),
        ([jsonl, "--vocab-size", 300, "--held-out", "0", *output], "'0' is not a number above 0 and up to 1"),
        ([jsonl, "--vocab-size", 300, "--type", "bqe", *output], "invalid choice: 'bqe'"),
        (["-", "--vocab-size", 300, *output], "not the standard input"),
        ([tmp_path / "one.txt", "--vocab-size", 300, *output], "needs 2 documents at least"),
        ([tmp_path / "broken.jsonl", "--vocab-size", 300, *output], "broken.jsonl, line 2: there is no key 'text'"),
        ([tmp_path / "broken.jsonl", "--vocab-size", 300, *model], "'body' (--json-keys chooses).\n"),
    ]
    for words, message in cases:
        code, _, err = tool("train_tokenizer", "--input", *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "input.jsonl", "one.txt"]
