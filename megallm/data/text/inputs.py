"""Which files an input names, and of which kind they are."""

import difflib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

STANDARD_INPUT = Path("-")
FORMATS = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".xz")
KINDS = ".jsonl, .json and .txt, each also with .gz, .zst or .xz behind it, and .parquet"
# What preprocessing itself writes may lie among the text: it is no text, whatever its names look like.
WORK_FOLDER_ENDING = ".preprocessing"
RECORD_ENDING = ".tokenizer.json"


class Kind(NamedTuple):
    """What a file's name says of it: a member of FORMATS, and one of COMPRESSIONS or nothing."""

    format: str
    compression: str


def name_of(path: Path) -> str:
    """What messages call a file."""
    return "standard input" if path == STANDARD_INPUT else str(path)


def kind_of(path: Path) -> Kind:
    """The kind that a file has by its name; the standard input is JSON lines.

    Raises:
        ValueError: it is of no kind that is read.
    """
    if path == STANDARD_INPUT:
        return Kind(".jsonl", "")
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    stem = name.removesuffix(compression)
    form = next((ending for ending in FORMATS if stem.endswith(ending)), "")
    if form == ".parquet" and compression:
        raise ValueError(f"{path}: Parquet packs its columns itself; unpack the {compression} around it.")
    if not form:
        raise ValueError(f"{path} is of an unknown kind; read are {KINDS}.")
    return Kind(form, compression)


def find_inputs(names: Sequence[str]) -> list[Path]:
    """The input files, in the order of the names; those of a pattern or a folder sorted by their path.

    A name is a file, a pattern (`*`, `?`, `[...]`, `**` for folders at any depth), a folder (all files of known kinds
    at any depth; hidden ones are left out, links to folders not followed) or `-` for the standard input. Patterns and
    folders leave out what preprocessing wrote.

    Raises:
        ValueError: nothing is there, a file is of an unknown kind, or a file comes twice. Two names of one file are
            refused, and not joined, since the second may be a slip for another file.
    """
    paths: list[Path] = []
    named: dict[str, str] = {}
    for name in names:
        for path in _matches(name):
            key = "-" if path == STANDARD_INPUT else os.path.realpath(path)
            if key in named:
                raise ValueError(f"{path} is named twice, by {named[key]!r} and by {name!r}; name each file once.")
            named[key] = name
            paths.append(path)
    if not paths:
        raise ValueError("There is no input: name files, patterns, folders or - for the standard input.")
    return paths


def _matches(name: str) -> list[Path]:
    path = Path(name)
    if path == STANDARD_INPUT:
        return [path]
    if path.exists():
        return _files_of(path)
    if glob.has_magic(name):
        matches = [match for match in map(Path, sorted(glob.glob(name, recursive=True))) if not _is_own(match)]
        found = [file for match in matches for file in _files_of(match)]
        if not found:
            raise ValueError(f"No file matches the pattern {name!r}.")
        return list(dict.fromkeys(found)) if "**" in name else found
    raise ValueError(f"{path} is not there{_nearest(path)}.")


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        kind_of(path)
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device: lead it to the standard input, which is --input -.")
    files = sorted(_walk(path))
    if not files:
        raise ValueError(f"The folder {path} has no file of a known kind; read are {KINDS}.")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_own(Path(name))]
        for name in files:
            if not name.startswith(".") and not _is_own(Path(name)) and _is_known(Path(name)):
                yield Path(here, name)


def _refuse(error: OSError) -> None:
    raise ValueError(f"The folder {error.filename} cannot be read: {error.strerror}.")


def _is_own(path: Path) -> bool:
    in_work_folder = any(part.endswith(WORK_FOLDER_ENDING) for part in path.parts)
    return in_work_folder or path.name.endswith(RECORD_ENDING)


def _is_known(path: Path) -> bool:
    try:
        kind_of(path)
    except ValueError:
        return False
    return True


def _nearest(path: Path) -> str:
    """A hint at what may be meant by a path that is not there."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f"; the nearest folder that exists is {folder}"
    try:
        names = os.listdir(folder)
    except OSError as error:
        return f"; {folder} cannot be listed: {error.strerror}"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; the nearest name is {folder / close[0]}" if close else f"; {folder} has nothing of a like name"
