"""How problems of a configuration reach the person who wrote it."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn


def numbered(problems: Sequence[str]) -> str:
    """One problem a line, numbered from 1."""
    return "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))


def counted(number: int, thing: str, things: str | None = None) -> str:
    """A number with what it counts: "1 process", "2 processes"; `things` is `thing` with an s by default."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def stop(prog: str, problems: Sequence[str]) -> NoReturn:
    """Leave because of a configuration, with all its problems on the standard error stream and exit code 2."""
    count = counted(len(problems), "problem")
    text = f"{prog}: {count} in the configuration; nothing was started.\n{numbered(problems)}"
    _leave(f"{text}\n`{prog} --help` lists every flag.")


def fail(prog: str, error: ValueError, code: int = 2) -> NoReturn:
    """Leave because of what a file holds or lacks, with its sentence on the standard error stream."""
    _leave(f"{prog}: {error}", code)


def interrupted(prog: str, sentence: str = "") -> NoReturn:
    """Leave because of Ctrl-C, with `sentence` from the first process of the job and the shell's exit code for it."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{prog}: interrupted" + (f"; {sentence}" if sentence else ""), file=sys.stderr, flush=True)
    # Other ranks may be gone: leaving in an orderly way would wait for them.
    os._exit(128 + signal.SIGINT)


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """What is wrong with a file of text, for a sentence that has named the file already."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is no text in UTF-8, with its byte 0x{error.object[error.start]:02x}"
    return error.strerror or str(error)


def _leave(text: str, code: int = 2) -> NoReturn:
    """Prints and exits without a traceback.

    Under a launcher (`LOCAL_RANK` is set) only the first process of each machine prints. The others wait, to be ended
    by the launcher: it ends all processes as soon as one fails, and would cut the first one short if they left before.
    One that is not ended by then was alone with its problem, and tells it.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10.0)
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextmanager
def while_somebody_reads() -> Iterator[None]:
    """Around what is told on the standard output: leaves with exit code 1 where who reads it, `head` for example, has
    seen enough."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads_output():
            raise
        # What is left would be written at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _nobody_reads_output() -> bool:
    """Whether the other end of the standard output is closed."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return bool(output.poll(0))


def warn_once(prog: str, sentences: Sequence[str]) -> None:
    """Print one warning that holds all sentences, on the first process of the job only."""
    if sentences and int(os.environ.get("RANK", "0")) == 0:
        print(f"{prog}: some flags have no effect here:\n{numbered(sentences)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text from a file for a terminal: characters that could move its cursor are written out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
