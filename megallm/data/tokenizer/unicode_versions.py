"""Texts whose composed form (NFC) is another one in an older version of Unicode."""

import re
import unicodedata

# Characters that came with Unicode 10 to 17 and have a combining class, by which marks that follow one another are put
# in order (UnicodeData.txt, field 3) ...
_MARKS = (
    "7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1add 1ae0-1aeb 1df6-1dfa a82c 10d24-10d27 10d69-10d6d "
    "10eab-10eac 10efa-10efb 10efd-10eff 10f46-10f50 10f82-10f85 11070 1133b 113ce-113d0 1145e 11839-1183a 1193d-1193e "
    "11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 11f41-11f42 1612f 16ff0-16ff1 1e08f 1e130-1e136 1e2ae "
    "1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5"
)
# ... and those that begin a pair which is composed to one character since then (field 5).
_BEGINNINGS = "105d2 105da 11382 11384 1138b 11390 113c2 11935 1611e 16121-16122 16129 16d63 16d67 16d69"


def _character_class(ranges: str) -> str:
    bounds = [[chr(int(number, 16)) for number in item.split("-")] for item in ranges.split()]
    return "".join("-".join(bound) for bound in bounds)


_CHANGED = re.compile(f"[{_character_class(_MARKS)}{_character_class(_BEGINNINGS)}]")


def composes_by_version(text: str) -> bool:
    """Whether NFC may be another text by the tables of Unicode 9 than by those of Unicode 17.

    What a text in NFC is composed of stays as it is in all versions. This goes by Python's tables, since that is many
    times faster than to look for single characters; of characters newer than these, nothing is known.
    """
    return not text.isascii() and not unicodedata.is_normalized("NFC", text) and _CHANGED.search(text) is not None
