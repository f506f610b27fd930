"""The fast library is used where it gives the reference's ids, refused elsewhere, stopped where it begins to differ."""

import sys
import unicodedata
from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import TEXTS
from tokenizers import Tokenizer, normalizers, processors

from megallm.data.tokenizer import fast
from megallm.data.tokenizer.base import TokenizerSettings, state_library
from megallm.data.tokenizer.build import build_tokenizer
from megallm.data.tokenizer.fast import FastTokenizer, FastTokenizerDiffers
from megallm.data.tokenizer.gigatoken import Gigatoken
from megallm.data.tokenizer.hard_texts import hard_texts
from megallm.data.tokenizer.record import describe
from megallm.data.tokenizer.training import TrainingSettings, train_tokenizer


class Fake:
    """The reference under the fast library's interface; wrong about texts that hold a certain word."""

    def __init__(self, reference, wrong_word):
        self.reference, self.wrong_word = reference, wrong_word

    def encode(self, text):
        ids = np.array(self.reference.encode(text), np.uint32)
        return ids[::-1] if self.wrong_word in text else ids


@pytest.fixture(scope="module")
def reference(tokenizer_json):
    return build_tokenizer(TokenizerSettings("HuggingFaceTokenizer", str(tokenizer_json)))


@pytest.fixture
def fake(reference, monkeypatch):
    """Makes a fast tokenizer that is wrong about a word; it is never asked for short documents at once."""
    monkeypatch.setattr(fast, "SHORT_DOCUMENT", 0)
    return lambda wrong_word: FastTokenizer(reference, lambda: Fake(reference, wrong_word), "fake 1.0")


def test_a_difference_in_the_first_documents_is_named(fake):
    tokenizer = fake("liquor")
    assert tokenizer.encode_flat(TEXTS[:3])[1].shape == (3,)
    with pytest.raises(
        FastTokenizerDiffers, match=r"fake 1.0 gives other ids than tokenizers .*: from token 0 on"
    ) as told:
        tokenizer.encode_flat(["", TEXTS[0], TEXTS[3], TEXTS[1]])
    assert told.value.index == 2
    assert "Use --fast-tokenizer never" in str(told.value)


def test_a_difference_later_is_found_in_the_random_sample(fake, monkeypatch):
    """Far behind the first documents, one of ten documents is wrong."""
    monkeypatch.setattr(fast, "FIRST_CHECKED", 1000)
    monkeypatch.setattr(fast, "CHECKED_SHARE", 0.05)
    tokenizer = fake("liquor")
    right = [TEXTS[0]] * 9
    while tokenizer._first_documents:
        tokenizer.encode_flat(right)

    def go_on():
        for _ in range(2000):
            tokenizer.encode_flat([*right, TEXTS[3]])

    with pytest.raises(FastTokenizerDiffers) as told:
        go_on()
    assert told.value.index == 9


def test_a_long_document_is_checked_in_parts(fake):
    tokenizer = fake("liquor")
    with pytest.raises(FastTokenizerDiffers):
        tokenizer.encode_flat([TEXTS[3] * 3000])


def test_the_sample_is_as_large_as_it_may_be(fake, monkeypatch):
    monkeypatch.setattr(fast, "FIRST_CHECKED", 3000)
    monkeypatch.setattr(fast, "CHECKED_SHARE", 0.1)
    tokenizer = fake("\0 never")
    checked = []
    monkeypatch.setattr(FastTokenizer, "_compare", lambda self, text, ids, index: checked.append(len(text)))
    texts = [text * 5 for text in TEXTS]
    characters = sum(map(len, texts))
    for _ in range(40):
        tokenizer.encode_flat(texts)
    budget = fast.FIRST_CHECKED + 40 * characters * fast.CHECKED_SHARE
    assert 0.95 * budget < sum(checked) <= budget


def test_a_library_that_is_wrong_from_the_start_is_refused(reference, monkeypatch):
    monkeypatch.setattr(
        fast, "find_gigatoken", lambda tokenizer: Gigatoken("fake 1.0", lambda: Fake(tokenizer, "DON'T"), None)
    )
    monkeypatch.setattr(fast, "SHORT_DOCUMENT", 0)
    assert fast.with_fast_library(reference, "never") is reference
    with pytest.raises(ValueError, match=r"--fast-tokenizer always is not possible: fake 1\.0 gives other ids"):
        fast.with_fast_library(reference, "always")
    assert fast.with_fast_library(reference, "auto") is reference
    assert "fake 1.0 gives other ids" in reference.fast_refusal
    reference.fast_refusal = ""


def test_a_library_that_is_not_installed(tokenizer_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    settings = ("HuggingFaceTokenizer", str(tokenizer_json))
    assert "pip install gigatoken" in build_tokenizer(TokenizerSettings(*settings, fast_tokenizer="auto")).fast_refusal
    with pytest.raises(ValueError, match="pip install gigatoken"):
        build_tokenizer(TokenizerSettings(*settings, fast_tokenizer="always"))


def test_its_memory_is_bounded(fake, monkeypatch):
    """Loaded anew when the process has grown, not before enough text, and each time where growth is not told."""
    loads, resident = [], iter([])
    tokenizer = fake("\0 never")
    load = tokenizer._load
    tokenizer._load = lambda: loads.append(1) or load()
    monkeypatch.setattr(fast, "TEXT_BETWEEN_LOADS", 1000)
    monkeypatch.setattr(fast, "resident_bytes", lambda: next(resident))
    tokenizer._resident, tokenizer._encoded = 0, 0
    tokenizer.encode_flat(["x" * 900])
    assert loads == []
    resident = iter([fast.LARGEST_GROWTH, fast.LARGEST_GROWTH + 1, 50, None, None])
    tokenizer.encode_flat(["x" * 100])
    assert loads == []
    tokenizer.encode_flat(["x"])
    assert (len(loads), tokenizer._resident, tokenizer._encoded) == (1, 50, 0)
    tokenizer.encode_flat(["x" * 1000])
    assert len(loads) == 2
    assert next(resident, "none left") == "none left"


def sentencepiece_bpe(folder, *special_tokens):
    path = folder / "tokenizer.model"
    settings = TrainingSettings("sentencepiece-bpe", 340, special_tokens=special_tokens)
    path.write_bytes(train_tokenizer(settings, TEXTS * 5, path).content)
    return path


@pytest.fixture(scope="module")
def gigatokens(tokenizer_json, tmp_path_factory):
    """A byte-level tokenizer, one that puts tokens around every text, and one of SentencePiece: plain and fast."""
    pytest.importorskip("gigatoken")
    folder = tmp_path_factory.mktemp("fast")
    library = Tokenizer.from_file(str(tokenizer_json))
    ends = [("<|endoftext|>", 0), ("t", library.token_to_id("t"))]
    library.post_processor = processors.TemplateProcessing(single="<|endoftext|> t $A t", special_tokens=ends)
    library.save(str(folder / "around.json"))
    files = {
        tokenizer_json: "HuggingFaceTokenizer",
        folder / "around.json": "HuggingFaceTokenizer",
        sentencepiece_bpe(folder): "SentencePieceTokenizer",
    }
    return [
        [build_tokenizer(TokenizerSettings(kind, str(path), fast_tokenizer=how)) for how in ("never", "always")]
        for path, kind in files.items()
    ]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(TEXTS), max_size=8))
def test_gigatoken_gives_the_same_ids(gigatokens, texts):
    for plain, quick in gigatokens:
        # Short documents go to the library all at once, long ones one by one.
        for batch in (texts, [text * (-(-1500 // max(1, len(text)))) for text in texts]):
            for expected, found in zip(plain.encode_flat(batch), quick.encode_flat(batch), strict=True):
                assert found.dtype == expected.dtype
                assert found.tolist() == expected.tolist()


@pytest.fixture(scope="module")
def composing(tokenizer_json, tmp_path_factory):
    """A tokenizer that composes characters first, plain and fast."""
    pytest.importorskip("gigatoken")
    path = tmp_path_factory.mktemp("composing") / "tokenizer.json"
    library = Tokenizer.from_file(str(tokenizer_json))
    library.normalizer = normalizers.NFC()
    library.save(str(path))
    settings = [TokenizerSettings("HuggingFaceTokenizer", str(path), fast_tokenizer=how) for how in ("never", "always")]
    return [build_tokenizer(settings) for settings in settings]


def is_known(text):
    """Whether this Python's tables of Unicode have all characters."""
    return all(unicodedata.category(character) != "Cn" for character in text)


def test_marks_that_libraries_put_in_another_order_are_left_to_the_reference(composing):
    plain, quick = composing
    texts = ["plain", "a\u08d2\u0323\u0301", "", "cafe\u0301 \u4f60", "\U00011935\U00011930", "\u00e9\u07fd", "end"]
    assert quick._differs_on is not None, "without that, the library's ids would come through"
    assert [quick._differs_on(text) for text in texts] == [False, True, False, False, True, False, False]
    for expected, found in zip(plain.encode_flat(texts), quick.encode_flat(texts), strict=True):
        assert found.dtype == expected.dtype
        assert found.tolist() == expected.tolist()
    assert quick._ids(texts[1]).tolist() != plain.encode(texts[1]), "a newer gigatoken or tokenizers: look again"


def test_a_difference_beside_texts_left_to_the_reference_is_named(reference, monkeypatch):
    monkeypatch.setattr(fast, "SHORT_DOCUMENT", 0)
    tokenizer = FastTokenizer(reference, lambda: Fake(reference, "liquor"), "fake 1.0", lambda text: "pack" in text)
    with pytest.raises(FastTokenizerDiffers) as told:
        tokenizer.encode_flat(["pack", TEXTS[0].replace("pack", ""), "liquor pack", "pack my liquor", "my liquor jugs"])
    assert told.value.index == 4


@pytest.mark.slow
@pytest.mark.parametrize("context", ["{} ", "a{} ", "a{}\u0323\u0301 ", "a\u0301\u0345{} ", "\u05d0{}\u05b0\u3099 "])
def test_every_character_composes_as_in_the_reference(composing, context):
    plain, quick = composing
    texts = [context.format(chr(number)) for number in range(0x110000) if not 0xD800 <= number < 0xE000]
    texts = list(filter(is_known, texts))
    for first in range(0, len(texts), 1 << 16):
        part = texts[first : first + (1 << 16)]
        expected, found = plain.encode_flat(part), quick.encode_flat(part)
        assert np.array_equal(expected[1], found[1])
        assert np.array_equal(expected[0], found[0])


def test_gigatoken_takes_text_that_looks_like_a_special_token_as_the_reference_does(gigatokens):
    for plain, quick in gigatokens:
        assert state_library(quick) == f"gigatoken {version('gigatoken')}, checked against {plain.library}"
        texts = ["<s>a</s> <unk> <0x41> <|endoftext|><mark> x", *hard_texts(plain)]
        assert quick.encode_flat(texts)[0].tolist() == plain.encode_flat(texts)[0].tolist()


def test_a_fast_tokenizer_is_the_same_tokenizer(gigatokens):
    for plain, quick in gigatokens:
        assert describe(quick) == describe(plain)
        assert quick.encode_batch(TEXTS) == plain.encode_batch(TEXTS)
        assert quick.decode(quick.encode(TEXTS[0])) == plain.decode(plain.encode(TEXTS[0]))


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "sentencepiece-unigram"])
def test_gigatoken_refuses_what_it_does_not_read(tmp_path, kind):
    pytest.importorskip("gigatoken")
    path = tmp_path / ("tokenizer.model" if kind.startswith("sentencepiece") else "tokenizer.json")
    path.write_bytes(train_tokenizer(TrainingSettings(kind, 340), TEXTS * 5, path).content)
    name = "SentencePieceTokenizer" if kind.startswith("sentencepiece") else "HuggingFaceTokenizer"
    plain = build_tokenizer(TokenizerSettings(name, str(path), fast_tokenizer="auto"))
    assert plain.fast_library == ""
    assert f"gigatoken does not read {path}" in plain.fast_refusal
    assert "\n" not in plain.fast_refusal
    assert state_library(plain) == f"{plain.library} ({plain.fast_refusal.rstrip('.')})"
    with pytest.raises(ValueError, match="--fast-tokenizer always is not possible: gigatoken does not read"):
        build_tokenizer(TokenizerSettings(name, str(path), fast_tokenizer="always"))


def test_gigatoken_is_refused_where_it_treats_an_added_token_in_another_way(tmp_path):
    """After a user-defined piece it puts another blank before the text that follows."""
    pytest.importorskip("gigatoken")
    path = sentencepiece_bpe(tmp_path, "<mark>")
    plain = build_tokenizer(TokenizerSettings("SentencePieceTokenizer", str(path), fast_tokenizer="auto"))
    assert "gives other ids than sentencepiece" in plain.fast_refusal


def test_gigatoken_is_refused_for_numbers():
    pytest.importorskip("gigatoken")
    null = build_tokenizer(TokenizerSettings("NullTokenizer", vocab_size=5, fast_tokenizer="auto"))
    assert null.fast_refusal == "gigatoken does not read null: it knows no tokenizers of the kind null."
