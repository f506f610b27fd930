"""Where training, validation and test data come from: Megatron's lists of datasets and its shares of them."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

SPLIT_NAMES = ("training", "validation", "test")
# What the file of --per-split-data-args-path calls them.
SPLIT_KEYS = ("train", "valid", "test")


@dataclass(frozen=True)
class DataSources:
    """What a user says about where the data lies: one list for all splits, or one for each.

    Attributes:
        data_path: Megatron's list, `prefix ...` or `weight prefix weight prefix ...`, of which `split` gives each split
            a share.
        data_args_path: a file that holds such a list, its words separated by blanks or lines.
        split: up to three shares, for training, validation and test.
        train_data_path, valid_data_path, test_data_path: lists of each split's own, read whole.
        per_split_data_args_path: a JSON file that holds those three: an object of "train", "valid" and "test", each
            a list or one text.
    """

    data_path: tuple[str, ...] = ()
    data_args_path: str | None = None
    split: str = "969, 30, 1"
    train_data_path: tuple[str, ...] = ()
    valid_data_path: tuple[str, ...] = ()
    test_data_path: tuple[str, ...] = ()
    per_split_data_args_path: str | None = None

    @property
    def flags(self) -> list[str]:
        """The flags that name datasets, one for each way in which that is done; there should be one."""
        own = (self.train_data_path, self.valid_data_path, self.test_data_path)
        of_splits = [f"--{key}-data-path" for key, words in zip(SPLIT_KEYS, own, strict=True) if words]
        return [
            *(["--data-path"] if self.data_path else []),
            *(["--data-args-path"] if self.data_args_path is not None else []),
            *of_splits[:1],
            *(["--per-split-data-args-path"] if self.per_split_data_args_path is not None else []),
        ]


@dataclass(frozen=True)
class SplitSource:
    """The datasets of one split.

    Attributes: `prefixes`; `weights`, one a prefix, or None; `bounds`, the split's share of each dataset's sequences;
    `flag`, how the user said so, for messages.
    """

    prefixes: list[str]
    weights: list[float] | None
    bounds: tuple[float, float]
    flag: str

    def __str__(self) -> str:
        """The list that gives these datasets."""
        if self.weights is None:
            return " ".join(self.prefixes)
        return " ".join(f"{weight} {prefix}" for weight, prefix in zip(self.weights, self.prefixes, strict=True))


def read_sources(sources: DataSources) -> list[SplitSource | None]:
    """The datasets of training, validation and test; None for a split that gets nothing.

    Raises:
        ValueError: datasets are named in no way or in two, a file cannot be read or does not hold what it should, or
            a list or the shares are not what they must be.
    """
    used = sources.flags
    if len(used) != 1:
        raise ValueError(
            f"The data is named {'by ' + ' and by '.join(used) if used else 'nowhere'}; one of --data-path, "
            "--data-args-path, --train-data-path with --valid-data-path, or --per-split-data-args-path must name it."
        )
    if sources.data_path or sources.data_args_path is not None:
        words = list(sources.data_path) or _read_text(sources.data_args_path or "", "--data-args-path").split()
        prefixes, weights = _parse(words, used[0])
        flag = f"--split {sources.split!r}"
        return [
            None if bounds is None else SplitSource(prefixes, weights, bounds, flag)
            for bounds in parse_split(sources.split)
        ]
    if sources.per_split_data_args_path is not None:
        lists = _read_lists(sources.per_split_data_args_path)
        flags = [f"{used[0]} {sources.per_split_data_args_path}, {key!r}" for key in SPLIT_KEYS]
    else:
        lists = [list(sources.train_data_path), list(sources.valid_data_path), list(sources.test_data_path)]
        flags = [f"--{key}-data-path" for key in SPLIT_KEYS]
    return [_whole(words, flag) if words else None for words, flag in zip(lists, flags, strict=True)]


def _parse(words: list[str], flag: str) -> tuple[list[str], list[float] | None]:
    try:
        return parse_data_path(words)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _whole(words: list[str], flag: str) -> SplitSource:
    """A split with datasets of its own. The weight of a single one means nothing there, as with Megatron."""
    prefixes, weights = _parse(words, flag)
    return SplitSource(prefixes, weights if len(prefixes) > 1 else None, (0.0, 1.0), flag)


def _read_text(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{flag}: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{flag}: {path} is no text in UTF-8.") from None


def _read_lists(path: str) -> list[list[str]]:
    """Words of the three splits from a file of JSON; an empty list for a split that it does not name."""
    flag = "--per-split-data-args-path"
    try:
        content = json.loads(_read_text(path, flag))
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag}: {path} is no JSON: {error}.") from None
    if not isinstance(content, dict) or not set(content) <= set(SPLIT_KEYS):
        raise ValueError(f'{flag}: {path} must hold one object with "train", "valid" and "test" alone.')
    lists = []
    for key in SPLIT_KEYS:
        value = content.get(key)
        words = value.split() if isinstance(value, str) else [] if value is None else value
        is_list = isinstance(words, list) and all(
            isinstance(word, str | int | float) and not isinstance(word, bool) for word in words
        )
        if not is_list:
            raise ValueError(f"{flag}: {key!r} in {path} must be a list of prefixes and weights, or one text of them.")
        lists.append([str(word) for word in words])
    return lists


def parse_data_path(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights from Megatron's list: `prefix ...` or `weight prefix weight prefix ...`.

    A list of even length whose every second entry, from the first on, is a number, holds weights.

    Raises:
        ValueError: the list is empty, a weight is not positive, or weights and prefixes do not go together.
    """
    entries = [entry.strip() for entry in data_path]
    if not entries or "" in entries:
        raise ValueError("The prefix of one dataset at least is needed: the path without .bin or .idx.")
    numbers = [entry for entry in entries if _number(entry) is not None]
    weights = [_number(entry) for entry in entries[::2]]
    if len(entries) % 2 or not any(weight is not None for weight in weights):
        # Megatron takes them for names of files here.
        if numbers:
            raise ValueError(
                f"In this list of {len(entries)} words the weights ({', '.join(numbers[:5])}) do not alternate with "
                "prefixes: write one weight before each prefix, or prefixes alone (one that is a number as ./2024)."
            )
        return entries, None
    known = [weight for weight in weights if weight is not None]
    if len(known) < len(weights):
        wrong = entries[2 * weights.index(None)]
        raise ValueError(f"Weights and prefixes do not alternate: {wrong!r} stands in the place of a weight.")
    for entry, weight in zip(entries[::2], known, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"The weight {entry} is not a positive number; leave its dataset out instead.")
    return entries[1::2], known


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """Three ranges of shares from Megatron's `--split`, "969, 30, 1" for example; None for a split that gets nothing.

    Raises:
        ValueError: there are more than three numbers, no positive one, or something that is no number.
    """
    shares = [_number(word) for word in re.findall(r"[.0-9]+", split)]
    values = [share for share in shares if share is not None]
    if re.search(r"[^.0-9,;:/\s\[\]()]", split) or len(values) < len(shares) or not 1 <= len(values) <= 3:
        raise ValueError(
            f"--split {split!r} must be one to three numbers, for training, validation and test, such as 969,30,1."
        )
    values += [0.0] * (3 - len(values))
    total = sum(values)
    if not 0 < total < math.inf:
        raise ValueError(f"--split {split!r} leaves no data to any split: one number at least must be positive.")
    # The sums are taken one after another, as Megatron does: the rounding of a bound depends on it.
    bounds = list(accumulate((value / total for value in values), initial=0.0))
    return [(low, high) if low < high else None for low, high in pairwise(bounds)]
