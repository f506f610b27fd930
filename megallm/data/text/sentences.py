"""Texts split into sentences."""

import re
from itertools import pairwise
from types import MappingProxyType

# Megatron's names of languages, and Chinese, which it lacks; the codes are sentencex's.
LANGUAGES = MappingProxyType(
    {
        "chinese": "zh",
        "czech": "cs",
        "danish": "da",
        "dutch": "nl",
        "english": "en",
        "estonian": "et",
        "finnish": "fi",
        "french": "fr",
        "german": "de",
        "greek": "el",
        "italian": "it",
        "malayalam": "ml",
        "norwegian": "no",
        "polish": "pl",
        "portuguese": "pt",
        "russian": "ru",
        "slovene": "sl",
        "spanish": "es",
        "swedish": "sv",
        "turkish": "tr",
    }
)
# Blanks of several bytes (no-break space, ideographic space) make the package fail next to an initial.
_WIDE_BLANK = re.compile(r"[^\S\x00-\x7f]")
_NOT_BLANK = re.compile(r"\S")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def check_language(language: str) -> None:
    """Raises:
    ValueError: there is no splitter for the language, or the package is not installed.
    """
    if language not in LANGUAGES:
        raise ValueError(f"There is no sentence splitter for {language!r}; there is one for {', '.join(LANGUAGES)}.")
    try:
        import sentencex  # noqa: F401 - only asks whether it is there
    except ImportError:
        raise ValueError("Splitting sentences needs the package sentencex: pip install sentencex.") from None


def split_sentences(text: str, language: str, keep_newlines: bool) -> list[str]:
    """The sentences of a text, by the rules of the package sentencex.

    A blank line ends a sentence; a single line's end does not, since texts may be wrapped. Every character that is not
    blank is in exactly one sentence, in order. Where the package breaks that promise, the text's paragraphs are given
    out as they are. Time grows linearly with the text; memory is about five times the text's.

    Args:
        text: any text.
        language: a key of LANGUAGES.
        keep_newlines: each sentence keeps the blanks that follow it (the first one also those before it), so that the
            sentences joined are the text; otherwise they are dropped. Blanks within a sentence stay either way.

    Raises:
        ValueError: as `check_language`.
    """
    check_language(language)
    spans = _spans(text, language) or _paragraphs(text)
    if not keep_newlines:
        return [text[start:end] for start, end in spans]
    if not spans:
        return [text] if text else []
    starts = [0, *(start for start, _ in spans[1:]), len(text)]
    return [text[start:end] for start, end in pairwise(starts)]


def _spans(text: str, language: str) -> list[tuple[int, int]]:
    """Start and end of each sentence without the blanks around it; empty where the package lost or changed something.

    The package drops line ends between paragraphs now and then: sentences are found again in the text.
    """
    spans: list[tuple[int, int]] = []
    position = 0
    prepared = _WIDE_BLANK.sub(" ", text)
    for part in _segment(prepared, language):
        sentence = part.strip()
        if not sentence:
            continue
        found = _NOT_BLANK.search(prepared, position)
        if found is None or not prepared.startswith(sentence, found.start()):
            return []
        position = found.start() + len(sentence)
        spans.append((found.start(), position))
    return [] if _NOT_BLANK.search(prepared, position) else spans


def _paragraphs(text: str) -> list[tuple[int, int]]:
    """Start and end of each paragraph, without the blanks around it."""
    stops = [*(match.start() for match in _BLANK_LINE.finditer(text)), len(text)]
    spans: list[tuple[int, int]] = []
    for start, stop in pairwise([0, *stops]):
        found = _NOT_BLANK.search(text, start, stop)
        if found is not None:
            spans.append((found.start(), start + len(text[start:stop].rstrip())))
    return spans


def _segment(text: str, language: str) -> list[str]:
    import sentencex

    try:
        parts: list[str] = sentencex.segment(LANGUAGES[language], text)
    except BaseException as error:
        # A failure inside the package's Rust code is no Exception; its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        return []
    return parts
