"""How far a job is, how fast, and how long it will take: one line on a terminal, lines in a log."""

import sys
import time
from pathlib import Path
from typing import TextIO

from megallm.data.prepare.journal import Totals
from megallm.data.prepare.pieces import Input
from megallm.data.text.inputs import STANDARD_INPUT, kind_of
from megallm.data.text.raw import Position

# A terminal is written to at most this often.
TERMINAL_SECONDS = 0.2


class Progress:
    """Told of each piece by the job.

    Args:
        log_interval: documents between two lines where there is no terminal.
        stream: where to write.
    """

    def __init__(self, log_interval: int = 1000, stream: TextIO | None = None) -> None:
        self._log_interval = log_interval
        self._stream = sys.stderr if stream is None else stream
        self._terminal, self._told_at = self._stream.isatty(), 0.0
        self._began = time.monotonic()
        self.totals = Totals()
        self._told = self._documents_before = self._input_bytes_before = 0
        self._position: Position | None = None

    def begin(self, source: Input, first: Position, position: Position, totals: Totals) -> None:
        """Work begins at `position`, where `totals` are done; the input begins at `first`."""
        self._sizes = [_file_size(path) for path in source.paths]
        self._plain = [
            path != STANDARD_INPUT and kind_of(path) in ((".jsonl", ""), (".json", "")) for path in source.paths
        ]
        self._knows_total = STANDARD_INPUT not in source.paths
        self._first_byte, self._start_byte = self._bytes_before(first), self._bytes_before(position)
        self._last_byte = self._bytes_before(source.end) if source.end else sum(self._sizes)
        self._told = self._documents_before = totals.documents
        self._input_bytes_before = totals.input_bytes
        self._began = time.monotonic()
        self.totals = totals
        if totals.documents:
            print(f"Going on after {totals.documents:,} documents of an earlier start.", file=self._stream, flush=True)

    def __call__(self, totals: Totals, position: Position) -> None:
        """A piece is done: `totals` of the job, up to `position`."""
        self._position = position
        now = time.monotonic()
        if self._terminal:
            if now - self._told_at >= TERMINAL_SECONDS:
                self._told_at = now
                self._stream.write(f"\r\x1b[K{self.line(totals, position)}")
                self._stream.flush()
        elif totals.documents - self._told >= self._log_interval:
            self._told = totals.documents
            print(self.line(totals, position), file=self._stream, flush=True)

    def line(self, totals: Totals, position: Position) -> str:
        """`Processed 12,000 documents (5210.3 documents/s, 24.90 MB/s), 31.4 %, 0:02:10 left.`"""
        text = f"Processed {totals.documents:,} documents ({self.rates(totals)})"
        here = self._bytes_before(position)
        done, left = here - self._start_byte, self._last_byte - here
        if not self._knows_total or done <= 0:
            return f"{text}."
        seconds = round((time.monotonic() - self._began) / done * left)
        percent = 100 * self._share_before(here)
        return f"{text}, {percent:.1f} %, {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left."

    def share_done(self) -> float | None:
        """Which part of the input is done, between 0 and 1; None where nobody knows: at the start, or of a stream."""
        if self._position is None or not self._knows_total:
            return None
        return self._share_before(self._bytes_before(self._position)) or None

    def _share_before(self, here: int) -> float:
        return (here - self._first_byte) / max(1, self._last_byte - self._first_byte)

    def rates(self, totals: Totals) -> str:
        """Speed since this start."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        documents = (totals.documents - self._documents_before) / seconds
        megabytes = (totals.input_bytes - self._input_bytes_before) / seconds / 1e6
        return f"{documents:.1f} documents/s, {megabytes:.2f} MB/s"

    def close(self) -> None:
        """Leave the line of a terminal."""
        if self._terminal and self._told_at:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _bytes_before(self, position: Position) -> int:
        """Bytes of the files before a position; a packed file counts when it is done: how it unpacks is not known."""
        before = sum(self._sizes[: position.file])
        if position.file < len(self._plain) and self._plain[position.file]:
            before += position.offset
        return before


def _file_size(path: Path) -> int:
    return 0 if path == STANDARD_INPUT else path.stat().st_size
