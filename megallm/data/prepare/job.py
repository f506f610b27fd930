"""Text files to token files: read, encode in several processes, write in order, and go on where a killed job was."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megallm.data.indexed.format import file_paths
from megallm.data.prepare.encoding import TOLD_BAD_DOCUMENTS, Encoded, Encoder, EncodeSettings
from megallm.data.prepare.journal import Journal, Totals, differences, read_json, write_json
from megallm.data.prepare.pieces import Input, Piece, light_pieces, whole_pieces
from megallm.data.prepare.pool import Pool
from megallm.data.prepare.progress import Progress
from megallm.data.prepare.shards import Shard, dataset_prefix
from megallm.data.prepare.work_folder import WorkFolder
from megallm.data.prepare.worker import WorkerDied, out_of_memory
from megallm.data.text.inputs import STANDARD_INPUT
from megallm.data.text.raw import MAX_DOCUMENT_BYTES, Position
from megallm.data.text.shards import cut
from megallm.data.tokenizer.record import describe, read_record, record_path, write_record

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class JobSettings:
    """What a job does.

    Attributes:
        paths: the input.
        output_prefix: start of the paths of the output.
        encode: how documents become tokens.
        shard: share of the input that is done; None for all.
        max_document_bytes: the longest document that is taken.
        overwrite: an output or a work folder of other conditions is replaced.
        keep: the work folder stays after an error that ends the job.
        journal_seconds: time between two journals.
    """

    paths: tuple[Path, ...]
    output_prefix: str
    encode: EncodeSettings
    shard: Shard | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    overwrite: bool = False
    keep: bool = False
    journal_seconds: float = 5.0

    @property
    def job_prefix(self) -> str:
        """Start of the paths of this shard's output."""
        return self.output_prefix + (self.shard.suffix if self.shard else "")

    def dataset_prefix(self, key: str) -> str:
        """Megatron's name for the dataset of one key, without .bin or .idx."""
        return dataset_prefix(self.job_prefix, key, self.encode.sentence_language is not None)

    @property
    def can_resume(self) -> bool:
        return STANDARD_INPUT not in self.paths


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `totals`, and `done_before`, whether the output was whole already."""

    totals: Totals
    done_before: bool = False


class EncodedInput:
    """Pieces of the input and what became of them, from this process or from several.

    Used as a context manager: leaving it ends the processes. Memory of each process: the tokenizer, a piece of 1 MiB of
    text (or one document, where that is longer) in the forms of its work; and here three pieces' tokens for each.
    """

    def __init__(self, encoder: Encoder, settings: EncodeSettings, source: Input, workers: int) -> None:
        self._encoder, self._source = encoder, source
        self._pool = Pool(settings, source, workers) if workers > 1 else None

    def __enter__(self) -> "EncodedInput":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.__exit__(*error)

    def wait_until_ready(self) -> None:
        """Return when every process has its tokenizer."""
        if self._pool is not None:
            self._pool.wait_until_ready()

    def read(self, start: Position) -> Iterator[tuple[Piece, Encoded]]:
        """Everything from `start` on, in order."""
        if self._pool is not None:
            yield from self._pool.encode_all(light_pieces(self._source, start))
            return
        for piece in whole_pieces(self._source, start):
            assert piece.documents is not None, "pieces that are read here hold their documents"
            yield piece, self._encoder.encode(piece.documents)


class Job:
    """One run of the preprocessing of one shard.

    Attributes: `settings`; `encoder`; `source`, what is read; `start`, the first position of the shard.

    Raises:
        ValueError: an input file or the tokenizer cannot be read.
    """

    def __init__(self, settings: JobSettings) -> None:
        self.settings = settings
        self.start, end = cut(settings.paths, *(settings.shard or Shard(0, 1)))
        self.source = Input(settings.paths, end, settings.max_document_bytes, settings.encode.keys)
        self._files = [_file_state(path) for path in settings.paths]
        self.encoder = Encoder(settings.encode)
        self._record = describe(self.encoder.tokenizer)
        self._conditions = self._describe_conditions()

    def run(self, workers: int, progress: Progress) -> Outcome:
        """Write `.bin`, `.idx` and record of each key; the bytes do not depend on `workers`.

        All files appear when all are whole. Killed at any moment, the job goes on where it was when it is started
        again. An error in the input or a full disk ends it and leaves nothing.

        Args:
            workers: processes that encode; 1 works in this one.
            progress: told of each piece.

        Raises:
            ValueError: the input is bad or empty, the output or the work folder is of other conditions, another job is
                at work on it, the disk is full, or a worker died.
        """
        folder = WorkFolder(self.settings.job_prefix, len(self.settings.encode.keys))
        keep = self.settings.can_resume
        try:
            journal = self._find_journal(folder)
            if journal is None:
                keep = False
                if (done := self._find_output()) is not None:
                    return Outcome(done, done_before=True)
                journal = self._new_journal(folder)
                keep = self.settings.can_resume
            only_moves = journal.whole
            if not only_moves:
                self._work(folder, journal, workers, progress)
            self._move(folder)
            keep = False
            return Outcome(journal.totals, done_before=only_moves)
        except _Refused:
            keep = True
            raise
        except WorkerDied:
            raise
        except MemoryError:
            raise out_of_memory("There is not enough memory") from None
        except ValueError:
            keep = keep and self.settings.keep
            raise
        except OSError as error:
            keep = keep and (self.settings.keep or error.errno not in FULL_DISK)
            raise ValueError(self._disk_sentence(error, folder, keep, progress)) from None
        finally:
            if keep:
                folder.close()
            else:
                folder.remove()

    def _describe_conditions(self) -> dict[str, Any]:
        """Everything that the output depends on; what to do with bad documents is looked at apart."""
        settings = self.settings
        encode = asdict(settings.encode)
        del encode["tokenizer"], encode["skip_bad_documents"]
        conditions = {
            "input": dict(zip(map(str, settings.paths), self._files, strict=True)),
            "order of input": list(map(str, settings.paths)),
            "shard": str(settings.shard or "all"),
            "max_document_bytes": settings.max_document_bytes,
            "tokenizer checksum": self._record["checksum"],
            "special tokens": self._record["special_tokens"],
            **encode,
        }
        # As it comes back from a journal.
        described: dict[str, Any] = json.loads(json.dumps(conditions))
        return described

    def _find_journal(self, folder: WorkFolder) -> Journal | None:
        """The journal of an earlier start of this very job."""
        try:
            journal = Journal.read(folder.journal_path)
            before = read_json(folder.conditions_path)
        except ValueError as error:
            if self.settings.overwrite:
                return None
            raise _Refused(str(error)) from None
        if journal is None or before is None or None in before["input"].values():
            # Nothing was done yet, or from a standard input that is gone.
            return None
        changes = differences(before, self._conditions)
        if not self.settings.encode.skip_bad_documents and journal.totals.skipped:
            number = sum(journal.totals.skipped.values())
            changes.append(f"{number:,} bad documents were skipped and now the first stops the job")
        if not changes:
            return journal
        if self.settings.overwrite:
            return None
        shown = "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
        raise _Refused(
            f"{folder.path} holds a job that was interrupted after {journal.totals.documents:,} documents, but it was "
            f"another one: {shown}. Start it as it was, choose another --output-prefix, or start over with --overwrite."
        )

    def _find_output(self) -> Totals | None:
        """Totals of a whole output of these conditions; refuses one of others."""
        settings = self.settings
        if settings.overwrite:
            return None
        paths = [path for key in settings.encode.keys for path in file_paths(settings.dataset_prefix(key))]
        there = [path for path in paths if path.exists()]
        if not there:
            return None
        records = [read_record(settings.dataset_prefix(key)) for key in settings.encode.keys]
        wanted = self._conditions_checksum()
        if len(there) == len(paths) and all(record and record.get("preparation") == wanted for record in records):
            first = records[0] or {}
            tokens = {key: (record or {})["tokens"] for key, record in zip(settings.encode.keys, records, strict=True)}
            return Totals(first["documents"], first["input_bytes"], tokens)
        raise ValueError(
            f"{there[0]} is there already, and not from this input with these options: choose another --output-prefix, "
            "or replace it with --overwrite."
        )

    def _job_checksum(self) -> str:
        """What all shards of one job have in common. Machines may see the input under other paths and times."""
        common = {name: value for name, value in self._conditions.items() if name not in ("shard", "order of input")}
        files = zip(self.settings.paths, self._files, strict=True)
        common["input"] = [[path.name, state and state[0]] for path, state in files]
        return _checksum(common)

    def _conditions_checksum(self) -> str:
        what = {**self._conditions, "skip_bad_documents": self.settings.encode.skip_bad_documents}
        if not self.settings.can_resume:
            # Nobody can know whether the same text would come again.
            what["input"] = os.urandom(16).hex()
        return _checksum(what)

    def _new_journal(self, folder: WorkFolder) -> Journal:
        folder.clear()
        keys = self.settings.encode.keys
        # The journal comes last: where there is one, there are its conditions.
        write_json(folder.conditions_path, self._conditions)
        journal = Journal(self.start, [[0, 0, 0] for _ in keys], Totals(tokens=dict.fromkeys(keys, 0)))
        journal.write(folder.journal_path)
        return journal

    def _work(self, folder: WorkFolder, journal: Journal, workers: int, progress: Progress) -> None:
        """Encode from the journal's position to the end of the input, and make the indices."""
        totals = journal.totals
        progress.begin(self.source, self.start, journal.position, totals)
        began = written = time.monotonic()
        seconds_before = totals.seconds
        for parts, sizes in zip(folder.parts, journal.sizes, strict=True):
            parts.open(sizes)
        with EncodedInput(self.encoder, self.settings.encode, self.source, workers) as encoded_input:
            for piece, encoded in encoded_input.read(journal.position):
                if encoded.stopped:
                    raise ValueError(self._stop_sentence(encoded.bad[-1][1]))
                self._append(folder, encoded, totals)
                now = time.monotonic()
                totals.seconds = seconds_before + now - began
                journal.position = piece.next
                if now - written >= self.settings.journal_seconds:
                    self._save(folder, journal)
                    written = time.monotonic()
                progress(totals, piece.next)
        self._check_unchanged()
        self._check_not_empty(totals)
        self._save(folder, journal)
        self._make_indices(folder, totals)
        journal.whole = True
        journal.write(folder.journal_path)

    def _append(self, folder: WorkFolder, encoded: Encoded, totals: Totals) -> None:
        for key, parts, content in zip(self.settings.encode.keys, folder.parts, encoded.keys, strict=True):
            parts.append(content.tokens, content.lengths, content.sequences)
            totals.tokens[key] += len(content.tokens) // self.encoder.dtype.itemsize
        totals.documents += encoded.documents
        totals.input_bytes += encoded.input_bytes
        totals.blank_lines += encoded.blank
        for kind, sentence in encoded.bad:
            totals.skipped[kind] = totals.skipped.get(kind, 0) + 1
            if len(totals.first_skipped) < TOLD_BAD_DOCUMENTS:
                totals.first_skipped.append(sentence)

    @staticmethod
    def _save(folder: WorkFolder, journal: Journal) -> None:
        journal.sizes = [parts.sync() for parts in folder.parts]
        journal.write(folder.journal_path)

    def _check_unchanged(self) -> None:
        """Whether the input is still what it was: a file that shrinks meanwhile would just seem to end early."""
        for path, before in zip(self.settings.paths, self._files, strict=True):
            if _file_state(path) != before:
                raise ValueError(f"{path} was changed while it was read: start again when nobody writes it any more.")

    def _check_not_empty(self, totals: Totals) -> None:
        # A shard may well have nothing; the merged output is looked at when the shards are merged.
        if self.settings.shard:
            return
        names = list(map(str, self.settings.paths))
        where = ", ".join(names[:3]) + (f" and {len(names) - 3} other files" if len(names) > 3 else "")
        if totals.documents == 0:
            bad = sum(totals.skipped.values())
            left_out = f" ({bad:,} bad documents were skipped: {totals.first_skipped[0].rstrip('.')})" if bad else ""
            raise ValueError(f"There is no document in {where}{left_out}.")
        for key, tokens in totals.tokens.items():
            if tokens == 0:
                raise ValueError(f"No document in {where} gives a token under the key {key!r}.")

    def _make_indices(self, folder: WorkFolder, totals: Totals) -> None:
        """Write what else the datasets need into the folder, so that only moves remain."""
        need = sum(parts.index_size() for parts in folder.parts)
        if shutil.disk_usage(folder.path).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        counts = {"documents": totals.documents, "input_bytes": totals.input_bytes}
        skipped = {"skipped_documents": sum(totals.skipped.values())}
        for key, parts in zip(self.settings.encode.keys, folder.parts, strict=True):
            parts.write_index(self.encoder.dtype)
            record = {
                **self._record,
                "json_key": key,
                "append_eod": self.settings.encode.append_eod,
                **counts,
                "tokens": totals.tokens[key],
                **skipped,
                "preparation": self._conditions_checksum(),
                "job": self._job_checksum(),
            }
            write_record(parts.record_prefix, record)

    def _move(self, folder: WorkFolder) -> None:
        """Move the finished files to their places; killed in between, the next start moves the others.

        An index is never seen beside tokens of another dataset.
        """
        for key, parts in zip(self.settings.encode.keys, folder.parts, strict=True):
            parts.close()
            bin_path, idx_path = file_paths(self.settings.dataset_prefix(key))
            bin_path.parent.mkdir(parents=True, exist_ok=True)
            if parts.tokens_path.exists():
                idx_path.unlink(missing_ok=True)
                os.replace(parts.tokens_path, bin_path)
            for source, target in (
                (record_path(parts.record_prefix), record_path(self.settings.dataset_prefix(key))),
                (parts.index_path, idx_path),
            ):
                if source.exists():
                    os.replace(source, target)
            sync_folder(bin_path.parent)

    def _stop_sentence(self, sentence: str) -> str:
        left = (
            "What was done is kept (--keep)"
            if self.settings.keep and self.settings.can_resume
            else "Nothing is written"
        )
        return f"{sentence.rstrip('.')}. {left}; --on-bad-document skip leaves such documents out and counts them."

    def _disk_sentence(self, error: OSError, folder: WorkFolder, keep: bool, progress: Progress) -> str:
        if error.errno not in FULL_DISK:
            return f"{self.settings.job_prefix} cannot be written: {error.strerror or error}."
        written = folder.size()
        need = "needs more"
        if share := progress.share_done():
            tokens = sum(progress.totals.tokens.values()) * self.encoder.dtype.itemsize
            need = f"needs about {round(tokens / share, -3):,.0f} for the tokens of all input"
        free = shutil.disk_usage(folder.path).free
        left = (
            f"the same command goes on there once there is room (or remove {folder.path})"
            if keep
            else "nothing of it is left there (--keep keeps what is done)"
        )
        return (
            f"{self.settings.job_prefix} cannot be written: {os.strerror(error.errno or 0)}. The job had written "
            f"{written:,} bytes and {need}; {free:,} bytes were free in {folder.path.parent}; {left}."
        )


class _Refused(ValueError):
    """What an earlier start left is of other conditions: it is not touched."""


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


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; some file systems cannot, and need not."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
