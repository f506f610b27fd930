"""A process that encodes pieces for another: what it runs, and the other's end of the line.

They talk through the worker's standard input and output, in frames: the length of a header, the header as JSON, and
the byte strings whose lengths the header gives. When the other process ends, however it ends, the worker ends too.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import megallm
from megallm.data.prepare.encoding import Encoded, Encoder, EncodeSettings, KeyTokens
from megallm.data.prepare.pieces import Input, Piece
from megallm.data.text.raw import BadDocument, Position, RawDocument
from megallm.data.tokenizer.base import TokenizerSettings

_LENGTH = struct.Struct("<Q")
_LINUX_PR_SET_PDEATHSIG = 1
# Signals that go to all processes of a terminal or a batch job: the parent takes them, and ends its workers.
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerDied(ValueError):
    """A worker ended without an answer."""


def out_of_memory(what: str) -> WorkerDied:
    """The error for a process that had not enough memory."""
    return WorkerDied(
        f"{what}: use fewer --workers or a smaller --max-document-bytes. The same command goes on where it was."
    )


class Worker:
    """One process that encodes. Made by the main thread; used by one thread at a time.

    Raises:
        ValueError: (from `encode`) the tokenizer cannot be built there, or an input file cannot be read.
        WorkerDied: (from `encode`) the process ended.
    """

    def __init__(self, settings: EncodeSettings, source: Input) -> None:
        package_root = str(Path(megallm.__file__).parents[1])
        search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        # The worker inherits the mask, so that no signal reaches it before it has said how it takes them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megallm.data.prepare.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": search_path},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stdin is not None and self._process.stdout is not None, "pipes were asked for"
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._ready = False
        with contextlib.suppress(BrokenPipeError):  # told when the answer is missing
            _send(self._requests, {"settings": asdict(settings), "source": _source_as_json(source)})

    def wait_until_ready(self) -> None:
        """Return when the tokenizer is built."""
        if not self._ready:
            self._receive()
            self._ready = True

    def encode(self, piece: Piece) -> Encoded:
        """What becomes of the documents of a piece."""
        self.wait_until_ready()
        try:
            if piece.documents is None:
                _send(self._requests, {"start": piece.start, "end": piece.next})
            else:
                rows = [_document_as_json(document) for document in piece.documents]
                _send(self._requests, {"documents": rows}, [document.content for document in piece.documents])
        except BrokenPipeError:
            raise self._death() from None
        header, parts = self._receive()
        keys = [KeyTokens(*parts[first : first + 3]) for first in range(0, len(parts), 3)]
        return Encoded(keys, bad=[(kind, sentence) for kind, sentence in header.pop("bad")], **header)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def _receive(self) -> tuple[dict[str, Any], list[bytes]]:
        try:
            header, parts = _receive(self._answers)
        except EOFError:
            raise self._death() from None
        if "error" in header:
            raise ValueError(header["error"])
        return header, parts

    def _death(self) -> WorkerDied:
        self._process.kill()
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return out_of_memory("A worker process was ended from outside, most likely for want of memory")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return WorkerDied(f"A worker process ended before its work was done ({how}).")


def main() -> None:
    """Encode until the other process closes the line."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not get between the frames.
    os.dup2(2, 1)
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _end_with_parent(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError):
        header, _ = _receive(requests)
        source = _source_from_json(header["source"])
        try:
            encoder = Encoder(_settings_from_json(header["settings"]))
        except ValueError as error:
            _send(answers, {"error": str(error)})
            return
        _send(answers, {})
        while True:
            header, contents = _receive(requests)
            try:
                encoded = encoder.encode(_documents(header, contents, source))
            except ValueError as error:
                _send(answers, {"error": str(error)})
                continue
            except MemoryError:
                # As the system would end it; the other process knows what to say.
                os.kill(os.getpid(), signal.SIGKILL)
            content = vars(encoded).copy()
            parts = [part for key in content.pop("keys") for part in (key.tokens, key.lengths, key.sequences)]
            _send(answers, content, parts)
            del encoded, content, parts, contents


def _end_with_parent(parent: int) -> None:
    """Have the system end this process when the other one ends, even in the middle of a long document.

    Where the system cannot do that, the end of the line does it after the piece at hand.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_LINUX_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _documents(header: dict[str, Any], contents: Sequence[bytes], source: Input) -> Any:
    if "start" in header:
        return source.read(Position(*header["start"]), Position(*header["end"]))
    return [_document_from_json(row, content) for row, content in zip(header["documents"], contents, strict=True)]


def _send(stream: IO[bytes], header: dict[str, Any], parts: Sequence[bytes | memoryview] = ()) -> None:
    text = json.dumps({**header, "parts": [len(part) for part in parts]}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for part in parts:
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    header = json.loads(_read(stream, length))
    return header, [_read(stream, size) for size in header.pop("parts")]


def _read(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _settings_from_json(content: dict[str, Any]) -> EncodeSettings:
    tokenizer = dict(content["tokenizer"])
    if tokenizer["tiktoken_special_tokens"] is not None:
        tokenizer["tiktoken_special_tokens"] = tuple(tokenizer["tiktoken_special_tokens"])
    return EncodeSettings(**{**content, "tokenizer": TokenizerSettings(**tokenizer), "keys": tuple(content["keys"])})


def _source_as_json(source: Input) -> dict[str, Any]:
    return {**asdict(source), "paths": [os.fspath(path) for path in source.paths]}


def _source_from_json(content: dict[str, Any]) -> Input:
    end = None if content["end"] is None else Position(*content["end"])
    paths = tuple(Path(path) for path in content["paths"])
    return Input(**{**content, "paths": paths, "end": end, "keys": tuple(content["keys"])})


def _document_as_json(document: RawDocument) -> list[Any]:
    """Everything but the content, which travels as bytes."""
    file, line, _, start, *following, problem = document
    return [file, line, start, following, None if problem is None else [problem.kind, str(problem)]]


def _document_from_json(row: list[Any], content: bytes) -> RawDocument:
    file, line, start, (next_file, next_offset, next_line), problem = row
    broken = None if problem is None else BadDocument(*problem)
    return RawDocument(file, line, content, start, next_file, next_offset, next_line, broken)


if __name__ == "__main__":
    main()
