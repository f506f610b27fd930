"""Tokenizers give text back, find their special tokens, and say what is wrong with their files."""

import json

import pytest
from small_data import TEXTS
from tokenizers import AddedToken, Tokenizer, processors

from megallm.data.tokenizer.base import TokenizerSettings
from megallm.data.tokenizer.build import TOKENIZER_TYPES
from megallm.data.tokenizer.build import build_tokenizer as build_from_settings


def build_tokenizer(*arguments, **settings):
    return build_from_settings(TokenizerSettings(*arguments, **settings))


def test_huggingface_round_trip(tokenizer_json):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_json))
    assert tokenizer.vocab_size == 300
    assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (0, None, None)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.decode([0]) == "<|endoftext|>"


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece(sentencepiece_model, kind):
    tokenizer = build_tokenizer(kind, str(sentencepiece_model))
    assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (2, 1, None)
    assert tokenizer.decode(tokenizer.encode("the quick café 🦊")) == "the quick café 🦊"
    assert max(tokenizer.encode(TEXTS[2])) < tokenizer.vocab_size
    assert tokenizer.encode("")[:1] == []


def test_folder_with_named_special_tokens(tokenizer_json, tmp_path):
    """Names in tokenizer_config.json come first; a limit on the length that the file carries is lifted."""
    library = Tokenizer.from_file(str(tokenizer_json))
    library.add_special_tokens([AddedToken("<done>", special=True), AddedToken("<start>", special=True), "<pad>"])
    library.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 301)])
    library.enable_truncation(4)
    library.enable_padding(pad_id=302, length=500)
    library.save(str(tmp_path / "tokenizer.json"))
    names = {"eos_token": {"content": "<done>"}, "bos_token": "<start>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (300, 301, 302)
    assert tokenizer.vocab_size == 303
    ids = tokenizer.encode(TEXTS[0])
    assert ids[0] == 301
    assert tokenizer.decode(ids[1:]) == TEXTS[0]


def test_null():
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (101, 100)
    assert tokenizer.encode(" 5 99 100\n") == [5, 99, 100]
    assert tokenizer.decode([5, 99]) == "5 99"
    with pytest.raises(ValueError, match="has ids 0 to 100, not 101"):
        tokenizer.encode("101")
    with pytest.raises(ValueError, match="reads numbers"):
        tokenizer.encode("five")


def test_mistakes(tokenizer_json, tmp_path):
    with pytest.raises(
        ValueError, match=r"no tokenizer type 'HugingFaceTokenizer'.*mean HuggingFaceTokenizer\?"
    ) as told:
        build_tokenizer("HugingFaceTokenizer", "x")
    assert all(name in str(told.value) for name in TOKENIZER_TYPES)
    with pytest.raises(ValueError, match="needs --tokenizer-model"):
        build_tokenizer("Llama2Tokenizer")
    with pytest.raises(ValueError, match="needs --vocab-size"):
        build_tokenizer("NullTokenizer")
    with pytest.raises(ValueError, match=r"There is no tokenizer file .*tokenizer.json"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    with pytest.raises(ValueError, match="There is no tokenizer file"):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is no tokenizer.json"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "broken.json"))
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path / "broken.json"))


def test_no_end_of_document(tokenizer_json, tmp_path):
    content = tokenizer_json.read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"has no token that ends a document; looked for <\|endoftext\|>, .*</s>"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
