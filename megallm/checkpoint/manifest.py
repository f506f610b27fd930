"""The manifest of a checkpoint: which file holds which box of which tensor, and the checksums of all of it.

`docs/checkpoint-format.md` describes it byte by byte. A manifest that is read is checked whole before anything in it is
used: it may be damaged, or made by somebody who wants to harm.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

FORMAT = "megallm checkpoint 1"
MANIFEST = "manifest.json"
CHUNK_BYTES = 2**20
# What the objects of a JSON text take is up to 40 times the text, which is held three times itself while it is checked.
_MEMORY_OF_TEXT = 48
# Manifests are a few hundred bytes for each box and 19 for each MiB of it: a hundredth of their files where these are
# large. So long they may be whatever their files are.
_ALWAYS_ALLOWED = 4 * 2**20
# A model of 10^12 parameters over 10,000 ranks stays below it.
_MOST_BYTES = 2**31
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of the elements, by their names in safetensors."""
_FILE_NAME = re.compile(r"rank_\d{5,}\.safetensors")
_TENSOR_NAME = re.compile(r"[a-z0-9_]+/[!-~]+")
_FOLDER_NAME = re.compile(r"iter_(\d{7,})(\.replaced\d*)?")
_DIGEST = re.compile(r"[0-9a-f]{16}")


class DamagedError(ValueError):
    """A checkpoint is not as it was written."""


def digest(data: memoryview | bytes) -> str:
    """XXH3, 64 bits, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True)
class SavedFile:
    """A rank's file: its size, where its data begins behind safetensors' header, and the digest of all before that."""

    name: str
    num_bytes: int
    data_begin: int
    header_digest: str


@dataclass(frozen=True)
class SavedBox:
    """A box of a tensor: `num_bytes` in file number `file`, from byte `begin` of the file on, in C order.

    `chunks` are the digests of its bytes, CHUNK_BYTES at a time, the last chunk shorter.
    """

    file: int
    begin: int
    num_bytes: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A logical tensor and the boxes that make it up, each element in one of them."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[SavedBox, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the tensors' values.

    Attributes: `iteration`; `token`, a name of this save that no other has; `state`, what a run needs to go on besides
    tensors, with its configuration under `config`; `files`; `tensors` by `kind/name`.
    """

    iteration: int
    token: str
    state: dict[str, Any]
    files: tuple[SavedFile, ...]
    tensors: dict[str, SavedTensor]


def rows_to_json(file: SavedFile, tensors: dict[str, SavedTensor]) -> dict[str, Any]:
    """The part of a manifest about files and tensors; `write_manifest` joins those of all ranks."""
    return {
        "files": [[file.name, file.num_bytes, file.data_begin, file.header_digest]],
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "boxes": [
                    [box.file, box.begin, box.num_bytes, list(box.offset), list(box.shape), list(box.chunks)]
                    for box in tensor.boxes
                ],
            }
            for name, tensor in tensors.items()
        },
    }


def join_rows(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Files and tensors of all ranks; part n speaks of file n."""
    files: list[Any] = []
    tensors: dict[str, Any] = {}
    for number, part in enumerate(parts):
        files += part["files"]
        for name, tensor in part["tensors"].items():
            boxes = [[number, *box[1:]] for box in tensor["boxes"]]
            known = tensors.setdefault(name, tensor | {"boxes": []})
            same = known["dtype"] == tensor["dtype"] and known["shape"] == tensor["shape"]
            assert same, f"ranks save {name} with other shapes"
            known["boxes"] += boxes
    return {"files": files, "tensors": tensors}


def to_json(iteration: int, token: str, state: dict[str, Any], rows: dict[str, Any]) -> bytes:
    """The bytes of a manifest."""
    content = {"format": FORMAT, "iteration": iteration, "token": token, "chunk_bytes": CHUNK_BYTES, "state": state}
    content |= rows
    return json.dumps({"digest": _digest_of(content), **content}, separators=(",", ":")).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, checked.

    Raises:
        DamagedError: there is none, or it is not one that this version could have written.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(_bytes_of(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path} cannot be read: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise DamagedError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    try:
        if content.pop("digest") != _digest_of(content) or content["chunk_bytes"] != CHUNK_BYTES:
            raise DamagedError(f"{path} is not as it was written: its checksum is another")
        manifest = _parse(content)
        named = _FOLDER_NAME.fullmatch(folder.name)
        if named and int(named[1]) != manifest.iteration:
            raise DamagedError(f"{path} is that of iteration {manifest.iteration}: the folder's name is another")
        return manifest
    except DamagedError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise DamagedError(f"{path} is not as this version writes it: {error!r}") from None


def _bytes_of(path: Path) -> bytes:
    """All of a plain file. A link could lead anywhere, a pipe never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is no plain file")
        described = 0
        for other in path.parent.glob("rank_*.safetensors"):
            # The first few files mostly show that it may be that long.
            if status.st_size <= most_bytes(described):
                break
            described += other.lstat().st_size
        if status.st_size > most_bytes(described):
            raise DamagedError(f"{path} has {status.st_size} bytes: none of files of {described} bytes is that long")
        text = file.read(status.st_size)
    if not text.isascii():
        # As a text of wide characters it would take four times as much.
        raise DamagedError(f"{path} is not as this version writes it: it holds other characters than ASCII")
    return text


def most_bytes(described: int) -> int:
    """How long the manifest of files of so many bytes may be. Reading it takes no more memory than the files' size,
    or 192 MiB where that is more.
    """
    return min(max(described // _MEMORY_OF_TEXT, _ALWAYS_ALLOWED), _MOST_BYTES)


def _digest_of(content: dict[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _parse(content: dict[str, Any]) -> Manifest:
    files = tuple(SavedFile(*row) for row in content["files"])
    for file in files:
        _require(bool(_FILE_NAME.fullmatch(file.name)), f"a file is called {file.name!r}")
        sizes = file.num_bytes, file.data_begin
        _require(all(map(_is_count, sizes)) and 0 < sizes[1] <= sizes[0], f"{file.name} has the sizes {sizes}")
        _require(_is_digest(file.header_digest), f"{file.name} has a broken checksum")
    _require(len({file.name for file in files}) == len(files), "a file is named twice")
    _require(isinstance(content["state"], dict) and isinstance(content["token"], str), "there is no state")
    _require(_is_count(content["iteration"]), "there is no iteration")
    # Names go into sentences on a terminal.
    broken = [name for name in content["tensors"] if not _TENSOR_NAME.fullmatch(name)]
    _require(not broken, f"a tensor is called {broken[:1]}")
    tensors = {name: _parse_tensor(name, row, files) for name, row in content["tensors"].items()}
    return Manifest(content["iteration"], content["token"], content["state"], files, tensors)


def _parse_tensor(name: str, row: dict[str, Any], files: tuple[SavedFile, ...]) -> SavedTensor:
    shape, item_size = tuple(row["shape"]), DTYPES[row["dtype"]].itemsize
    _require(bool(shape) and all(_is_count(size) for size in shape), f"{name} has the shape {shape}")
    boxes = tuple(
        SavedBox(file, begin, num_bytes, tuple(offset), tuple(sizes), tuple(chunks))
        for file, begin, num_bytes, offset, sizes, chunks in row["boxes"]
    )
    for box in boxes:
        numbers = (box.file, box.begin, *box.offset, *box.shape)
        _require(all(_is_count(number) for number in numbers), f"{name} has a box with {numbers}")
        _require(len(box.offset) == len(box.shape) == len(shape), f"a box of {name} has other dims")
        inside = all(o + n <= size for o, n, size in zip(box.offset, box.shape, shape, strict=True))
        _require(inside, f"a box of {name} lies outside of it")
        _require(box.num_bytes == math.prod(box.shape) * item_size, f"a box of {name} has {box.num_bytes} bytes")
        first, last = files[box.file].data_begin, files[box.file].num_bytes - box.num_bytes
        _require(first <= box.begin <= last, f"a box of {name} lies outside its file")
        count = -(-box.num_bytes // CHUNK_BYTES)
        _require(len(box.chunks) == count, f"a box of {name} has {len(box.chunks)} checksums, not {count}")
        _require(all(_is_digest(chunk) for chunk in box.chunks), f"a box of {name} has a broken checksum")
    held = sum(math.prod(box.shape) for box in boxes)
    _require(held == math.prod(shape), f"{held} of {math.prod(shape)} elements of {name} are there")
    _require(not _overlap_somewhere(boxes), f"boxes of {name} overlap")
    return SavedTensor(row["dtype"], shape, boxes)


def _overlap_somewhere(boxes: tuple[SavedBox, ...]) -> bool:
    """Whether an element is in two boxes: another one would then be in none, and keep what was in memory before."""
    # Down the rows, with the boxes that the current row goes through: few, since ranks hold flat ranges.
    current: list[SavedBox] = []
    for box in sorted((box for box in boxes if math.prod(box.shape)), key=lambda box: box.offset[0]):
        current = [other for other in current if other.offset[0] + other.shape[0] > box.offset[0]]
        for other in current:
            sides = zip(box.offset, box.shape, other.offset, other.shape, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                return True
        current.append(box)
    return False


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))
