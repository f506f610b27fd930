"""Files that `torch.save` writes: a zip archive, not compressed, of a pickle and of each tensor's memory."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megallm.checkpoint.stream import Flushing
from megallm.convert.pickled import StorageRef, TensorRef, read_pickle, write_pickle
from megallm.convert.raw import RawTensor, bytes_of
from megallm.convert.safetensors_file import Declared, write_all

_STORAGES = {
    torch.float64: "torch.DoubleStorage",
    torch.float32: "torch.FloatStorage",
    torch.bfloat16: "torch.BFloat16Storage",
    torch.float16: "torch.HalfStorage",
}
_DTYPES = {name: dtype for dtype, name in _STORAGES.items()}
_LOCAL_HEADER_BYTES = 30
_MOST_PICKLE_BYTES = 2**30


def read_torch_file(path: Path, begin: int = 0, num_bytes: int | None = None) -> Any:
    """What a file, or a part of one, holds, with a `RawTensor` where there is a tensor of weights' types.

    Other tensors stay a `TensorRef`.

    Raises ValueError where it is not such a file, or holds anything but data.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(_Part(file, begin, num_bytes)) as archive:
            entries = {name.split("/", 1)[-1]: entry for name, entry in archive.NameToInfo.items()}
            if "data.pkl" not in entries:
                raise ValueError("there is no data.pkl in it")
            if entries["data.pkl"].file_size > _MOST_PICKLE_BYTES:
                raise ValueError(f"its data.pkl has {entries['data.pkl'].file_size} bytes")
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
            if order != b"little":
                raise ValueError(f"its bytes are in the order {order!r}")
            content = read_pickle(archive.read(entries["data.pkl"]))
            places = {
                key.removeprefix("data/"): _place(file, entry, begin)
                for key, entry in entries.items()
                if key.startswith("data/")
            }
        return _with_places(content, path, places, {})
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is not a whole archive of torch's ({error}): it is cut off, or from before torch 1.6; then load it"
            " with torch and save it anew"
        ) from None
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a file of torch's that can be trusted: {error}") from None


class _Part(io.RawIOBase):
    """A range of a file as a file."""

    def __init__(self, file: BinaryIO, begin: int, num_bytes: int | None) -> None:
        self._file, self._begin = file, begin
        self._size = os.fstat(file.fileno()).st_size - begin if num_bytes is None else num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError("before the beginning")
        self._at = origin + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = os.pread(self._file.fileno(), left if size < 0 else min(size, left), self._begin + self._at)
        self._at += len(data)
        return data


def _place(file: BinaryIO, entry: zipfile.ZipInfo, begin: int) -> tuple[int, int]:
    """First byte and number of bytes of an entry's content in the file."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    at = begin + entry.header_offset
    header = os.pread(file.fileno(), _LOCAL_HEADER_BYTES, at)
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return at + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes, entry.file_size


def _with_places(value: Any, path: Path, places: Mapping[str, tuple[int, int]], done: dict[int, Any]) -> Any:
    """`value` with raw tensors in its dictionaries, lists and tuples.

    What stands in several places of it is made once, else lists of lists of one list would take for ever: `done` has
    it by its identity.
    """
    if isinstance(value, dict | list | tuple):
        if id(value) not in done:
            if isinstance(value, dict):
                made: Any = {key: _with_places(entry, path, places, done) for key, entry in value.items()}
            else:
                made = type(value)(_with_places(entry, path, places, done) for entry in value)
            done[id(value)] = made
        return done[id(value)]
    if not isinstance(value, TensorRef) or value.storage.kind not in _DTYPES:
        return value
    dtype = _DTYPES[value.storage.kind]
    begin, num_bytes = places[value.storage.key]
    first = value.offset * dtype.itemsize
    if not _is_contiguous(value) or not 0 <= first <= num_bytes - math.prod(value.shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {value.shape} and strides {value.stride} is not stored row by row")
    return RawTensor(path, begin + first, dtype, value.shape)


def _is_contiguous(tensor: TensorRef) -> bool:
    expected = 1
    for size, stride in zip(tensor.shape[::-1], tensor.stride[::-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def write_torch_file(
    path: Path,
    content: Callable[[Mapping[str, TensorRef]], Any],
    declared: Sequence[Declared],
    tensors: Iterable[torch.Tensor],
) -> None:
    """Writes a file that `torch.load` reads: what `content` makes of the tensors' places, and the `tensors`.

    They come as they were declared, one after another; nothing is kept of one when the next is asked for. The file is
    flushed to the disk.

    Raises OSError where it cannot be written.
    """
    places = {one.name: _reference(number, one) for number, one in enumerate(declared)}
    # With a buffer: the archive does not look whether the system took all that it was given.
    with open(path, "xb") as file, Flushing(file.fileno()) as flushing:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", write_pickle(content(places)))
            archive.writestr("archive/byteorder", "little")
            left = iter(enumerate(declared))
            for tensor in tensors:
                number, one = next(left)
                found = (tensor.dtype, tuple(tensor.shape))
                assert found == (one.dtype, one.shape), f"{one.name} is {found}, declared as {one}"
                with archive.open(f"archive/data/{number}", "w", force_zip64=one.num_bytes >= 2**31) as entry:
                    write_all(entry, bytes_of(tensor), flushing)
                del tensor
            assert next(left, None) is None, f"{path} has fewer tensors than were declared"
            archive.writestr("archive/version", "3\n")
        file.flush()
        flushing.finish()


def _reference(number: int, declared: Declared) -> TensorRef:
    size = math.prod(declared.shape)
    stride = tuple(math.prod(declared.shape[dim + 1 :]) for dim in range(len(declared.shape)))
    return TensorRef(StorageRef(_STORAGES[declared.dtype], str(number), size), 0, declared.shape, stride)
