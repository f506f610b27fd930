"""Texts split into sentences: goldens, and that nothing is lost or comes twice."""
# ruff: noqa: RUF001 - Chinese has marks that look like ours

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megallm.data.text import sentences
from megallm.data.text.sentences import LANGUAGES, split_sentences

sentencex = pytest.importorskip("sentencex")

ENGLISH = [
    ["Dr. Smith met Mr. Jones at 3.5 p.m. on Jan. 5.", "They talked about the U.S. economy."],
    ['"It is fine," he said.', '"Really?" she asked.', "Prices rose 2.5 percent."],
    ["We make a good team, you and I.", "Did you see Albert I. Jones yesterday?"],
    ["Hello world!", "How are you?", "This line\nis wrapped, e.g. here, i.e. twice.", "Another (see Fig. 3)."],
    ["It costs $3.99 at example.com.", "Visit https://a.b/c.d?e=f for more."],
    ["A heading without an end", "A paragraph.", "No end"],
]
CHINESE = [
    ["床前明月光，\n疑是地上霜。", "举头望明月，\n低头思故乡。"],
    ["今天气温是3.5度。", "你去吗？", "我不去……真的？！", "“是的。”", "她说。"],
    ["他说：“你好！”", "然后走了。", "第二段（见图1）。", "完"],
]


@pytest.mark.parametrize("expected", ENGLISH)
def test_english(expected):
    # The heading's own paragraph ends without a mark.
    text = "\n\n".join(expected) if "heading" in expected[0] else " ".join(expected)
    assert split_sentences(text, "english", keep_newlines=False) == expected


@pytest.mark.parametrize("expected", CHINESE)
def test_chinese(expected):
    assert split_sentences("".join(expected), "chinese", keep_newlines=False) == expected


def test_sentences_keep_the_blanks_that_follow_them():
    text = " \nOne ends.  Two\nends.\n\n\tThree.\n"
    assert split_sentences(text, "english", True) == [" \nOne ends.  ", "Two\nends.\n\n\t", "Three.\n"]
    assert split_sentences(text, "english", False) == ["One ends.", "Two\nends.", "Three."]


def test_wide_blanks_around_an_initial_do_not_stop_the_splitter():
    text = "It ends here.\xa0 By\u3000A\u3000. Really? Yes."
    assert split_sentences(text, "english", False) == ["It ends here.", "By\u3000A\u3000. Really?", "Yes."]


def test_texts_without_a_sentence():
    assert split_sentences("", "english", True) == split_sentences(" \n", "english", False) == []
    assert split_sentences(" \n", "english", True) == [" \n"]


TEXT = st.text('ab. A\n"!?。！？”“…()（）\t\r1,;*-\u3000\u2028\xa0\x1c\x85é🦊', max_size=60)


@settings(max_examples=500, deadline=None)
@given(TEXT | st.text(), st.sampled_from(["english", "chinese", "german"]))
@example("a\u3000A\u3000.b \u2028A\u2028.", "english")
def test_nothing_is_lost_and_nothing_comes_twice(text, language):
    assert "".join(split_sentences(text, language, True)) == text
    parts = split_sentences(text, language, False)
    assert all(part and part == part.strip() for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


@pytest.mark.parametrize(
    "broken", [["One. "], ["One. ", "One. ", "Two.\n\n \nThree."], ["Two.", "One."], ["One. Too."]]
)
def test_a_splitter_that_loses_text_is_not_believed(monkeypatch, broken):
    monkeypatch.setattr(sentencex, "segment", lambda language, text: broken)
    text = "One. Two.\n\n \nThree."
    assert split_sentences(text, "english", False) == ["One. Two.", "Three."]
    assert "".join(split_sentences(text, "english", True)) == text


def test_a_failure_inside_the_splitter_is_not_fatal(monkeypatch):
    class PanicException(BaseException):
        pass

    def fail(language, text):
        raise PanicException

    monkeypatch.setattr(sentencex, "segment", fail)
    assert split_sentences("One. Two.\n\nThree.", "english", False) == ["One. Two.", "Three."]


def test_long_texts_of_odd_shapes_come_out_whole():
    """Without ends, ends alone, blanks alone, quotes that never close; the test would not end if time were square."""
    for piece in ("word ", ".", "\n \n", '"word. ', "a.b", "x. ", "\n"):
        text = piece * (600_000 // len(piece))
        assert "".join(split_sentences(text, "english", True)) == text


def test_every_language_has_rules():
    for language in LANGUAGES:
        assert split_sentences("A b c? D e f!", language, False) == ["A b c?", "D e f!"]


def test_mistakes_are_sentences(monkeypatch):
    with pytest.raises(ValueError, match=r"no sentence splitter for 'klingon'; there is one for chinese, .* english"):
        split_sentences("a", "klingon", False)
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(ValueError, match="pip install sentencex"):
        sentences.check_language("english")
