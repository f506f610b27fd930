"""Everything that the output of a job depends on: whether what an earlier start left is of the same job."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megallm.data.prepare.settings import JobSettings
from megallm.data.text.inputs import STANDARD_INPUT


class Conditions:
    """The conditions of a job, as they are when it is made.

    Args:
        settings: of the job.
        record: of its tokenizer (see `megallm.data.tokenizer.record`).

    Attributes: `described`, all that the output depends on, as it comes back from JSON; what to do with bad documents
    is looked at apart.

    Raises:
        ValueError: an input file cannot be read.
    """

    def __init__(self, settings: JobSettings, record: dict[str, Any]) -> None:
        self._settings = settings
        self._files = [_file_state(path) for path in settings.paths]
        encode = asdict(settings.encode)
        del encode["tokenizer"], encode["skip_bad_documents"]
        conditions = {
            "input": dict(zip(map(str, settings.paths), self._files, strict=True)),
            "order of input": list(map(str, settings.paths)),
            "shard": str(settings.shard or "all"),
            "max_document_bytes": settings.max_document_bytes,
            "tokenizer checksum": record["checksum"],
            "special tokens": record["special_tokens"],
            **encode,
        }
        self.described: dict[str, Any] = json.loads(json.dumps(conditions))

    def checksum(self) -> str:
        """Of all conditions: an output with the same one needs no work."""
        what = {**self.described, "skip_bad_documents": self._settings.encode.skip_bad_documents}
        if not self._settings.can_resume:
            # Nobody can know whether the same text would come again.
            what["input"] = os.urandom(16).hex()
        return _checksum(what)

    def job_checksum(self) -> str:
        """Of what all shards of one job have in common. Machines may see the input under other paths and times."""
        common = {name: value for name, value in self.described.items() if name not in ("shard", "order of input")}
        files = zip(self._settings.paths, self._files, strict=True)
        common["input"] = [[path.name, state and state[0]] for path, state in files]
        return _checksum(common)

    def check_unchanged(self) -> None:
        """Raise ValueError where an input file is no longer what it was: one that shrinks would just seem to end."""
        for path, before in zip(self._settings.paths, self._files, strict=True):
            if _file_state(path) != before:
                raise ValueError(f"{path} was changed while it was read: start again when nobody writes it any more.")


def _file_state(path: Path) -> list[int] | None:
    """Size in bytes and time of the last change in nanoseconds; None for the standard input."""
    if path == STANDARD_INPUT:
        return None
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    return [status.st_size, status.st_mtime_ns]


def _checksum(content: dict[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
