"""Megatron's text for which stage holds what: `Et*3|(tt|)*29,m|L`."""

from __future__ import annotations

import re

_REPEATED = (re.compile(r"\(([^()]*)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))
_MAX_LETTERS = 1_000_000
_KNOWN = "E the embedding, t a layer, L the output layer"


def parse_stage_layout(text: str) -> list[int]:
    """The number of layers in each stage that `text` describes, in order.

    Stages are separated by `|`; E stands for the embedding, t for a layer, L for the output layer and its loss. `x*3`
    repeats one letter or bar, `(..)*3` a group; commas and blanks say nothing.

    Raises ValueError, a sentence without its end, for anything that is not such a text: other letters, an embedding
    that does not stand first, an output layer that does not stand last.
    """
    letters = re.sub(r"[,\s]", "", text)
    for pattern in _REPEATED:
        while found := pattern.search(letters):
            times = int(found[2])
            if len(found[1]) * times > _MAX_LETTERS:
                raise ValueError(f"'{found[0]}' repeats too often")
            letters = letters[: found.start()] + found[1] * times + letters[found.end() :]
    foreign = sorted(set(letters) - set("EtL|"))
    if "m" in foreign:
        raise ValueError("'m' stands for the prediction of further tokens, which there is not here")
    if foreign:
        raise ValueError(f"'{''.join(foreign)}' stands for nothing; there are {_KNOWN}, and bars between stages")
    stages = letters.split("|")
    if letters.count("E") != 1 or not letters.startswith("E"):
        raise ValueError("the embedding E must stand once, at the beginning")
    if letters.count("L") != 1 or not letters.endswith("L"):
        raise ValueError("the output layer L must stand once, at the end")
    return [stage.count("t") for stage in stages]
