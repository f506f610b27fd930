"""Each kind of tokenizer: its ids are the library's, texts come back, special tokens are found, mistakes are named."""

import base64
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import TEXTS
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

from megallm.data.tokenizer.base import BadText, TokenizerSettings, state_special_tokens
from megallm.data.tokenizer.build import TOKENIZER_TYPES
from megallm.data.tokenizer.build import build_tokenizer as build_from_settings
from megallm.data.tokenizer.tiktoken import PATTERNS

ODD_TEXTS = [
    "",
    " ",
    "\n\n \t\r\n",
    "   three blanks   ",
    "\x00\x07\x7f\x85\u200b\ufeff",
    "e\u0301 \u0130 \u00df \u01c5 \ufb01 \u00bd \uff13 \u2167",
    "\u4f60\u597d\uff0c\u4e16\u754c \U0001f98a \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "a<|endoftext|>b </s> [SEP] <EOD> <extra_id_1>",
    "x" * 300,
    *TEXTS,
]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "fox", "##es", "Fox", "cafe", "."]


def build_tokenizer(*arguments, **settings):
    return build_from_settings(TokenizerSettings(*arguments, **settings))


@pytest.fixture(scope="session")
def merges(tokenizer_json):
    """Tokens of a byte-level vocabulary as bytes, the 256 bytes first, then the merged ones in their order."""
    # The characters that stand for bytes, as GPT-2 chose them.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
    assert sorted(byte_of) == sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = json.loads(tokenizer_json.read_text())["model"]["vocab"]
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    merged = [text for text in in_order if len(text) > 1 and text != "<|endoftext|>"]
    return [bytes([byte]) for byte in range(256)] + [bytes(byte_of[char] for char in text) for text in merged]


@pytest.fixture(scope="session")
def files(tmp_path_factory, tokenizer_json, merges):
    """A folder with GPT-2's files, BERT's vocabulary, a rank file and a list of tokens."""
    folder = tmp_path_factory.mktemp("files")
    model = json.loads(tokenizer_json.read_text())["model"]
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "gpt2" / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in model["merges"])]))
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(merges)]
    (folder / "ranks.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(merges)
    ]
    (folder / "list.json").write_text(json.dumps(entries))
    config = {"pattern": PATTERNS["v2"], "default_vocab_size": 290, "default_num_special_tokens": 10}
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": entries}))
    return folder


@pytest.fixture(scope="session")
def every_kind(files, tokenizer_json, sentencepiece_model):
    """A tokenizer of each type, by a name."""
    model = str(sentencepiece_model)
    gpt2 = {"vocab_file": str(files / "gpt2/vocab.json"), "merge_file": str(files / "gpt2/merges.txt")}
    tiktoken = {"tiktoken_num_special_tokens": 10}
    return {
        "huggingface": build_tokenizer("HuggingFaceTokenizer", str(tokenizer_json)),
        "sentencepiece": build_tokenizer("SentencePieceTokenizer", model),
        "legacy": build_tokenizer("SentencePieceTokenizer", model, tokenizer_sentencepiece_legacy=True),
        "sentinels": build_tokenizer("SentencePieceTokenizer", model, vocab_extra_ids=12),
        "gpt2": build_tokenizer("GPT2BPETokenizer", **gpt2),
        "ranks": build_tokenizer(
            "TikTokenizer",
            str(files / "ranks.tiktoken"),
            tiktoken_pattern="cl100k",
            tiktoken_special_tokens=("<|endoftext|>",),
        ),
        "list": build_tokenizer("TikTokenizer", str(files / "list.json"), **tiktoken),
        "bert": build_tokenizer("BertWordPieceCase", vocab_file=str(files / "bert/vocab.txt"), vocab_extra_ids=2),
    }


@pytest.mark.parametrize("kind", ["huggingface", "gpt2", "ranks", "list"])
def test_texts_come_back(every_kind, kind):
    tokenizer = every_kind[kind]
    for text in ODD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(ODD_TEXTS), max_size=6))
def test_flat_ids_are_those_of_each_text(every_kind, texts):
    for tokenizer in every_kind.values():
        ids, lengths = tokenizer.encode_flat(texts)
        assert (ids.dtype.name, lengths.dtype.name) == ("int32", "int64")
        each = [tokenizer.encode(text) for text in texts]
        assert lengths.tolist() == [len(part) for part in each]
        assert ids.tolist() == [token_id for part in each for token_id in part]


def test_special_tokens_have_megatrons_ids(every_kind):
    """The numbers follow from Megatron's rules: appended tokens come in its order, after the vocabulary."""
    pieces = every_kind["sentencepiece"].vocab_size
    stated = {kind: state_special_tokens(tokenizer) for kind, tokenizer in every_kind.items()}
    appended = (
        f"end of document <EOD> = {pieces + 2}, beginning <s> = 1, padding <PAD> = {pieces + 4}, "
        f"classification <CLS> = {pieces}, separator <SEP> = {pieces + 1}, mask <MASK> = {pieces + 3}"
    )
    assert stated == {
        "huggingface": "end of document <|endoftext|> = 0",
        "sentencepiece": "end of document </s> = 2, beginning <s> = 1",
        "legacy": appended,
        "sentinels": f"{appended}, 12 sentinels {pieces + 5} to {pieces + 16}",
        "gpt2": "end of document <|endoftext|> = 0",
        "ranks": "end of document <|endoftext|> = 299",
        "list": "end of document </s> = 2, beginning <s> = 1, padding <pad> = 4, classification <cls> = 5, "
        "separator <sep> = 6, mask <mask> = 3",
        "bert": "end of document [EOS] = 13, beginning [BOS] = 12, padding [PAD] = 0, classification [CLS] = 2, "
        "separator [SEP] = 3, mask [MASK] = 4, 2 sentinels 14 to 15",
    }
    sizes = {kind: tokenizer.vocab_size for kind, tokenizer in every_kind.items()}
    assert (sizes["legacy"], sizes["sentinels"], sizes["bert"]) == (pieces + 5, pieces + 17, 16)
    assert (sizes["ranks"], sizes["list"]) == (300, 309)


def test_appended_tokens_in_a_text_become_themselves(every_kind):
    tokenizer, plain = every_kind["sentinels"], every_kind["sentencepiece"]
    tenth = tokenizer.sentinel_ids[10]
    ids = tokenizer.encode("the<extra_id_10>fox<s>")
    assert ids == [*plain.encode("the"), tenth, *plain.encode("fox"), 1]
    assert tokenizer.decode(ids) == "the <extra_id_10> fox <s>"
    assert tokenizer.encode("no such token") == plain.encode("no such token")


def test_sentencepiece_model_in_a_folder_and_by_other_names(sentencepiece_model, every_kind, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    for kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer"):
        tokenizer = build_tokenizer(kind, str(tmp_path))
        assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (2, 1, None)
        assert tokenizer.encode(TEXTS[2]) == every_kind["sentencepiece"].encode(TEXTS[2])
        assert tokenizer.decode(tokenizer.encode("the quick café 🦊")) == "the quick café 🦊"


def test_gpt2_is_what_transformers_makes_of_the_files(files, every_kind):
    transformers = pytest.importorskip("transformers")
    gpt2 = files / "gpt2"
    reference = transformers.GPT2TokenizerFast(vocab=str(gpt2 / "vocab.json"), merges=str(gpt2 / "merges.txt"))
    for tokenizer in (
        every_kind["gpt2"],
        build_tokenizer("GPT2BPETokenizer", str(gpt2)),
        build_tokenizer("HuggingFaceTokenizer", str(gpt2)),
    ):
        for text in ODD_TEXTS:
            assert tokenizer.encode(text) == reference(text).input_ids


@pytest.mark.parametrize("lower_case", [True, False])
def test_wordpiece_is_what_transformers_makes_of_the_file(files, lower_case):
    transformers = pytest.importorskip("transformers")
    vocab = files / "bert" / "vocab.txt"
    reference = transformers.BertTokenizerFast(vocab=str(vocab), do_lower_case=lower_case)
    kind = "BertWordPieceLowerCase" if lower_case else "BertWordPieceCase"
    for tokenizer in (build_tokenizer(kind, vocab_file=str(vocab)), build_tokenizer(kind, str(vocab.parent))):
        for text in [*ODD_TEXTS, "The quick Foxes. Café"]:
            assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids
    folder = build_tokenizer("HuggingFaceTokenizer", str(vocab.parent))
    assert folder.encode("The fox") == transformers.BertTokenizerFast(vocab=str(vocab))("The fox").input_ids


def test_tiktoken_is_what_tiktoken_makes_of_the_ranks(every_kind, files, merges):
    tiktoken = pytest.importorskip("tiktoken")
    for kind, pattern, first, count in (("ranks", "cl100k", 0, 299), ("list", "v2", 10, 299)):
        ranks = {token: first + rank for rank, token in enumerate(merges[:count])}
        reference = tiktoken.Encoding("reference", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
        for text in ODD_TEXTS:
            assert every_kind[kind].encode(text) == reference.encode_ordinary(text)
    # Mistral's file says itself how large it is; the vocabulary may also be cut by hand.
    assert build_tokenizer("TikTokenizer", str(files / "tekken.json"), tiktoken_num_special_tokens=10).vocab_size == 290
    cut = build_tokenizer("TikTokenizer", str(files / "list.json"), tiktoken_num_special_tokens=10, vocab_size=270)
    assert cut.vocab_size == 270
    assert max(cut.encode(TEXTS[0])) < 270
    names = ("<unk>", "<s>", "</s>", "<pad>", "<odd>")
    named = build_tokenizer(
        "TikTokenizer", str(files / "list.json"), tiktoken_num_special_tokens=6, tiktoken_special_tokens=names
    )
    assert [named.token_text(number) for number in range(6)] == [*names, "<SPECIAL_5>"]


def test_patterns_are_the_published_ones():
    """Against the patterns in tiktoken's own package, which reaches for the network only for the ranks."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    load, public.load_tiktoken_bpe = public.load_tiktoken_bpe, lambda *arguments, **named: {}
    try:
        published = {name: getattr(public, f"{name}_base")()["pat_str"] for name in ("r50k", "cl100k", "o200k")}
    finally:
        public.load_tiktoken_bpe = load
    assert [PATTERNS[name] for name in ("gpt2", "cl100k", "o200k")] == list(published.values())


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
    with pytest.raises(BadText, match="has ids 0 to 100, not 101"):
        tokenizer.encode("101")
    with pytest.raises(BadText, match="reads whole numbers separated by blanks, not 'five'"):
        tokenizer.encode("five")
    inside = build_tokenizer("NullTokenizer", vocab_size=100, null_tokenizer_eod_id=7)
    assert (inside.vocab_size, inside.eod_id) == (100, 7)
    with pytest.raises(ValueError, match="100 is none of the ids 0 to 99"):
        build_tokenizer("NullTokenizer", vocab_size=100, null_tokenizer_eod_id=100)


def test_mistakes(tokenizer_json, sentencepiece_model, files, tmp_path):
    with pytest.raises(
        ValueError, match=r"no tokenizer type 'HugingFaceTokenizer'.*mean HuggingFaceTokenizer\?"
    ) as told:
        build_tokenizer("HugingFaceTokenizer", "x")
    assert all(name in str(told.value) for name in TOKENIZER_TYPES)
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    (tmp_path / "words.txt").write_text("a\nb\n")
    (tmp_path / "bytes.txt").write_bytes(b"a\n\xff\n")
    (tmp_path / "ranks.tiktoken").write_text("IQ== 0\n\nnonsense\n")
    (tmp_path / "reordered.json").write_text('[{"rank": 1, "token_bytes": "AA=="}]')
    tik = str(files / "list.json")
    cases = [
        ("Llama2Tokenizer", {}, "needs --tokenizer-model"),
        ("NullTokenizer", {}, "needs --vocab-size"),
        ("GPT2BPETokenizer", {"vocab_file": "x"}, "needs --vocab-file vocab.json and --merge-file merges.txt"),
        ("GPT2BPETokenizer", {"tokenizer_model": empty}, "There is no tokenizer file .*vocab.json"),
        ("GPT2BPETokenizer", {"vocab_file": broken, "merge_file": broken}, "are no vocabulary and merges of GPT-2"),
        ("BertWordPieceCase", {}, "needs --vocab-file"),
        ("BertWordPieceCase", {"vocab_file": empty / "x"}, "There is no tokenizer file"),
        ("BertWordPieceCase", {"vocab_file": tmp_path / "words.txt"}, r"there is no \[UNK\], \[CLS\]"),
        ("BertWordPieceCase", {"vocab_file": tmp_path / "bytes.txt"}, "byte 2 is no UTF-8"),
        ("HuggingFaceTokenizer", {"tokenizer_model": empty}, "There is no tokenizer file in .*empty: a tokenizer.json"),
        ("HuggingFaceTokenizer", {"tokenizer_model": empty / "x"}, "There is no tokenizer file .*x"),
        ("HuggingFaceTokenizer", {"tokenizer_model": broken}, "broken.json is no tokenizer.json"),
        ("HuggingFaceTokenizer", {"tokenizer_model": sentencepiece_model}, "is no tokenizer.json"),
        ("SentencePieceTokenizer", {"tokenizer_model": empty}, "There is no tokenizer file"),
        ("SentencePieceTokenizer", {"tokenizer_model": broken}, "is no SentencePiece model"),
        ("SentencePieceTokenizer", {"tokenizer_model": tokenizer_json}, "is no SentencePiece model"),
        ("Llama2Tokenizer", {"tokenizer_model": broken, "vocab_extra_ids": 5}, "--vocab-extra-ids 5 does not act on"),
        ("TikTokenizer", {"tokenizer_model": empty / "x"}, "There is no tokenizer file"),
        ("TikTokenizer", {"tokenizer_model": broken}, "is no list of tokens"),
        ("TikTokenizer", {"tokenizer_model": tokenizer_json}, "rank and token_bytes: there is no 'config'"),
        ("TikTokenizer", {"tokenizer_model": tmp_path / "reordered.json"}, "do not count up from 0"),
        ("TikTokenizer", {"tokenizer_model": tmp_path / "ranks.tiktoken"}, "line 3: no token and rank"),
        ("TikTokenizer", {"tokenizer_model": files / "ranks.tiktoken"}, "give --tiktoken-pattern, one of v1, v2"),
        (
            "TikTokenizer",
            {"tokenizer_model": files / "ranks.tiktoken", "tiktoken_pattern": "v1"},
            "holds no special tokens",
        ),
        ("TikTokenizer", {"tokenizer_model": tik, "tiktoken_pattern": "v3"}, "not 'v3'"),
        ("TikTokenizer", {"tokenizer_model": tik, "tiktoken_num_special_tokens": 3}, "--tiktoken-num-special-tokens 7"),
        ("TikTokenizer", {"tokenizer_model": tik, "vocab_size": 5000}, "there is room for 1256 to 1299"),
        ("TikTokenizer", {"tokenizer_model": tik, "tiktoken_special_tokens": ("a", "a")}, "names a token twice"),
        ("TikTokenizer", {"tokenizer_model": tik, "tiktoken_special_tokens": ("a", "b")}, "has no token that ends"),
    ]
    for kind, given_settings, message in cases:
        paths = {key: value if isinstance(value, (int, tuple)) else str(value) for key, value in given_settings.items()}
        with pytest.raises(ValueError, match=message):
            build_tokenizer(kind, **paths)


def test_a_folder_whose_rules_stand_in_no_file_is_refused(files, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((files / "gpt2" / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ValueError, match="Qwen2Tokenizer cuts text by rules that stand in no file"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path)).eod_id == 0


def test_no_end_of_document(tokenizer_json, tmp_path):
    content = tokenizer_json.read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"has no token that ends a document; looked for <\|endoftext\|>, .*</s>"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))


def test_a_missing_library_is_named(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="pip install tiktoken"):
        build_tokenizer("TikTokenizer", str(files / "list.json"))


def test_no_library_is_imported_before_it_is_used():
    libraries = ["torch", "tokenizers", "sentencepiece", "tiktoken", "gigatoken", "awkward", "transformers"]
    code = f"import sys, megallm.data.tokenizer.build; print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
