"""How far a job is: a small file that is always whole, so that a job that was killed can be taken up again."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megallm.data.text.raw import Position

VERSION = 1


@dataclass
class Totals:
    """What has been done.

    Attributes: `documents` written; `input_bytes` of documents read; `tokens` written under each key; `skipped`, bad
    documents left out, by kind; `first_skipped`, a sentence for each of the first of them; `blank_lines` passed over;
    `seconds` of work, of earlier starts too.
    """

    documents: int = 0
    input_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: list[str] = field(default_factory=list)
    blank_lines: int = 0
    seconds: float = 0.0


@dataclass
class Journal:
    """State of a job at one moment.

    Attributes: `position` in the input from which to go on; `sizes` of the part files in bytes, for each key; `totals`
    up to there; `whole`, whether all input is done and the finished files are being moved to their places.
    """

    position: Position
    sizes: list[list[int]]
    totals: Totals
    whole: bool = False

    def write(self, path: Path) -> None:
        """Put it where it can be read again. Raises OSError."""
        write_json(path, {"version": VERSION, **asdict(self)})

    @staticmethod
    def read(path: Path) -> "Journal | None":
        """The journal at `path`, or None where there is none.

        Raises:
            ValueError: it cannot be read, or another version of this program wrote it.
        """
        content = read_json(path)
        if content is None:
            return None
        try:
            if content.pop("version") != VERSION:
                raise KeyError("version")
            content["position"] = Position(*content["position"])
            content["totals"] = Totals(**content["totals"])
            return Journal(**content)
        except (TypeError, KeyError):
            raise ValueError(
                f"{path} is not the journal of this version's preprocessing: --overwrite starts over."
            ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write beside the place, bring it to the disk, and move it there. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None where there is no file. Raises ValueError where there is no such object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: --overwrite starts over.")
    return content


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between the conditions of two starts, a phrase each."""
    changes = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changes += [f"{name} {change}" for change in differences(old, new)]
        elif old is None and name not in before:
            changes.append(f"{name} {new} is new")
        elif new is None and name not in now:
            changes.append(f"{name} is gone")
        else:
            changes.append(f"{name} was {_short(old)} and is {_short(new)}")
    return changes


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
