"""Files opened as streams of bytes, whether they are packed or not."""

import io
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from megallm.data.text.inputs import STANDARD_INPUT, kind_of, name_of

# Four bytes of Zstandard can stand for 128 KiB of text, so little is unpacked in one go, for the sake of memory.
PACKED_PIECE = 1024
GZIP_FORMAT = 16 + zlib.MAX_WBITS
# Files packed with `zstd --long=31` ask for this much.
ZSTANDARD_WINDOW = 2**31
READ_BLOCK = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_stream(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked where its name ends in .gz, .zst or .xz; `-` is the standard input.

    Files of several gzip members, Zstandard frames or xz streams are read to their end. Reading holds a few hundred
    KiB, and what the format itself asks for: 32 KiB with gzip, the dictionary with xz, the window with Zstandard (8 MiB
    at its usual levels, 2 GiB at most). A Zstandard file can make a piece of up to 64 MiB at once.

    Raises:
        ValueError: the file cannot be opened, or zstandard is not installed. Reading from the stream raises it when the
            file is damaged or cut off, with the file and how far it was read.
    """
    name = name_of(path)
    try:
        if path == STANDARD_INPUT:
            return cast(BinaryIO, _Stream(name, sys.stdin.buffer, closes=False))
        compression = kind_of(path).compression
        raw = open(path, "rb", buffering=0)  # noqa: SIM115 - the stream closes it
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from None
    source: Any = raw
    if compression == ".gz":
        source = _Parts(raw, lambda: zlib.decompressobj(GZIP_FORMAT), zlib.error, b"\0")
    elif compression == ".xz":
        source = _Parts(raw, lzma.LZMADecompressor, lzma.LZMAError, b"\0")
    elif compression == ".zst":
        source = _zstandard_parts(name, raw)
    return cast(BinaryIO, _Stream(name, source, file=raw))


def first_block(stream: BinaryIO) -> tuple[bytes, int]:
    """The first bytes of a stream, without the byte order mark of UTF-8, and the length of that mark or 0."""
    block = stream.read(READ_BLOCK)
    # Packed files may come in small pieces.
    while 0 < len(block) < len(BYTE_ORDER_MARK) and (more := stream.read(READ_BLOCK)):
        block += more
    if not block.startswith(BYTE_ORDER_MARK):
        return block, 0
    # An empty block would stand for the end.
    return block[len(BYTE_ORDER_MARK) :] or stream.read(READ_BLOCK), len(BYTE_ORDER_MARK)


def skip_bytes(stream: BinaryIO, offset: int, name: str) -> None:
    """Go to `offset` in a stream that stands at its start; packed files are read up to there.

    Raises:
        ValueError: the stream is shorter.
    """
    if stream.seekable():
        length = stream.seek(0, io.SEEK_END)
        stream.seek(min(offset, length))
    else:
        length = 0
        while length < offset and (block := stream.read(min(READ_BLOCK, offset - length))):
            length += len(block)
    if length < offset:
        raise ValueError(f"{name} has {length:,} bytes, yet reading should go on at byte {offset:,}: it has changed.")


class _Stream(io.RawIOBase):
    """A source whose errors are sentences; only unpacked files can seek."""

    def __init__(self, name: str, source: Any, closes: bool = True, file: io.RawIOBase | None = None) -> None:
        self._name, self._source, self._closes, self._file = name, source, closes, file
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file is self._source

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation("seek")
        self._offset = self._source.seek(offset, whence)
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: Any) -> int:
        try:
            count: int = self._source.readinto(buffer)
        except EOFError:
            raise ValueError(f"{self._name} is cut off: it ends inside its packed data{self._progress()}.") from None
        except zlib.error as error:
            raise ValueError(f"{self._name} is damaged{self._progress()}: {error}.") from None
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{self._name} cannot be read beyond byte {self._offset:,}: {reason}.") from None
        self._offset += count
        return count

    def _progress(self) -> str:
        return f" (after {self._offset:,} bytes of unpacked text)"

    def close(self) -> None:
        if not self.closed and self._closes:
            self._source.close()
            if self._file is not None:
                self._file.close()
        super().close()


class _Parts(io.RawIOBase):
    """The packed parts of a file, one after another: members of gzip, frames of Zstandard, streams of xz.

    The usual readers end in silence at a cut-off frame and at a damaged head of a later stream, and do not tell how far
    they came in gzip; unpacking part by part shows all of that.

    Args:
        file: the packed bytes.
        make_unpacker: gives an object that unpacks one part, with `decompress`, `eof` and `unused_data`.
        error: what such an object raises for damaged data.
        padding: a byte that may stand between parts and after them, any number of times.
    """

    def __init__(
        self, file: io.RawIOBase, make_unpacker: Callable[[], Any], error: type[Exception], padding: bytes
    ) -> None:
        self._file = io.BufferedReader(file, 2**18)
        self._make_unpacker, self._error, self._padding = make_unpacker, error, padding
        self._unpacker: Any = None
        self._packed = b""
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            piece = self._packed or self._file.read(PACKED_PIECE)
            self._packed = b""
            if not piece:
                if self._unpacker is not None:
                    raise EOFError
                return 0
            self._pending = memoryview(self._unpack(piece))
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _unpack(self, piece: bytes) -> bytes:
        if self._unpacker is None:
            piece = piece.lstrip(self._padding) if self._padding else piece
            if not piece:
                return b""
            self._unpacker = self._make_unpacker()
        try:
            unpacked: bytes = self._unpacker.decompress(piece)
        except self._error as error:
            raise zlib.error(str(error)) from None
        if self._unpacker.eof:
            self._packed, self._unpacker = self._unpacker.unused_data, None
        return unpacked

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _zstandard_parts(name: str, file: io.RawIOBase) -> _Parts:
    try:
        import zstandard
    except ImportError:
        file.close()
        raise ValueError(f"Reading {name} needs the package zstandard: pip install zstandard.") from None
    unpacker = zstandard.ZstdDecompressor(max_window_size=ZSTANDARD_WINDOW)
    return _Parts(file, unpacker.decompressobj, zstandard.ZstdError, b"")
