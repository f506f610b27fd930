"""Texts on which tokenizers that ought to be equal are found to differ."""

from collections.abc import Iterator

from megallm.data.tokenizer.base import Tokenizer


def hard_texts(reference: Tokenizer) -> Iterator[str]:
    """Texts on which tokenizers differ: blanks, digits, scripts, marks, control characters, special tokens as text."""
    yield from ("", " ", "\n", "a", " a", "a ", "  a", "\u2581", "a\u2581 b", "\ufeffbom", "\u00a0x\u3000y")
    blanks = (" ", "\n", "\t", "\r\n", " \n", "\u00a0", "\u2003")
    yield "".join("x" + blank * count for blank in blanks for count in (1, 2, 3, 17))
    yield "don't DON'T we'll I'VE it's 'S 'tis rock'n'roll you\u2019re \u2018quoted\u2019 x'd 'LL 'Re"
    yield "1 12 123 1234 12345678901234567890 1,234.5e-6 0x1F x2y3 a1b22c333"
    yield "\u00bd \u0663\u0664 \uff11\uff12 \u2167 \u00b2\u2085 3\u00bd4"
    yield "caf\u00e9 cafe\u0301 \u1e9b\u0323 \u212b \ufb01 \u0130stanbul \u00df \u01c5 \u01c6 \u03a9\u2126"
    yield "a\u0301\u0302\u0303b \u093f\u0915\u094d\u0937 \u0e01\u0e33 \u0627\u064e\u0644 \u05e9\u05b8\u05c1"
    yield "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4e2d\u6587\u548cEnglish \u65e5\u672c\u8a9e\u30ab\u30ca"
    yield "\ud55c\uad6d\uc5b4 \uff46\uff55"
    yield "\u041f\u0440\u0438\u0432\u0435\u0442 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0947"
    yield "\U0001f98a \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f"
    yield "".join(map(chr, range(0x20))) + "a\x7fb\x80c\x85d\u2028e\u2029f\ue000\ufffd\u200b\u2060\U0010ffff"
    yield "def f(x):\n    return {'a': [1, 2]}  # ok\n\n\n\tif x != y && z||w:"
    yield '<html a="b">&amp;</html> /* c */ ~/p_q-r.s 1\ufe0f\u20e3 \U0001fae0'
    yield "a" * 1000 + " " * 500 + "ab" * 300 + "=" * 200 + "\u4e00" * 100
    # Characters of every script, alone and inside a word.
    spread = [*range(0xA1, 0x3400, 13), *range(0x1F000, 0x1FA80, 9), *range(0xA000, 0xD7A4, 199), 0x20000, 0xE0101]
    yield " ".join(f"{chr(number)} a{chr(number)}b" for number in spread if chr(number).isprintable())
    for text in _tokens_in_texts(reference):
        yield f"a{text}b {text} {text}{text} c\n{text[:-1]} {text.lower()} {text.upper()}{text}"


def _tokens_in_texts(reference: Tokenizer) -> list[str]:
    """Special tokens, and some of the texts that are tokens of their own wherever they stand."""
    special = [reference.token_text(token_id) for token_id in reference.special_tokens().values()]
    own = reference.texts_with_own_token()
    # There may be hundreds, all alike.
    return list(dict.fromkeys([*special, *own[:20], *own[-5:]]))
