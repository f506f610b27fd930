"""Text files to token files: read, encode in several processes, write in order, and go on where a killed job was."""

import errno
import os
import shutil
import time
from dataclasses import dataclass

from megallm.data.indexed.format import file_paths
from megallm.data.indexed.output import FULL_DISK, sync_folder
from megallm.data.prepare.conditions import Conditions
from megallm.data.prepare.encoded_input import EncodedInput
from megallm.data.prepare.encoding import TOLD_BAD_DOCUMENTS, Encoded, Encoder
from megallm.data.prepare.journal import Journal, Totals, differences, read_json, write_json
from megallm.data.prepare.pieces import Input
from megallm.data.prepare.progress import Progress
from megallm.data.prepare.settings import JobSettings
from megallm.data.prepare.shards import Shard
from megallm.data.prepare.work_folder import WorkFolder
from megallm.data.prepare.worker import WorkerDied, out_of_memory
from megallm.data.text.inputs import name_of
from megallm.data.text.shards import cut
from megallm.data.tokenizer.record import describe, read_record, record_path, write_record


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `totals`, and `done_before`, whether the output was whole already."""

    totals: Totals
    done_before: bool = False


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
        self.encoder = Encoder(settings.encode)
        self._record = describe(self.encoder.tokenizer)
        self._conditions = Conditions(settings, self._record)

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
        changes = differences(before, self._conditions.described)
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
        wanted = self._conditions.checksum()
        if len(there) == len(paths) and all(record and record.get("preparation") == wanted for record in records):
            first = records[0] or {}
            tokens = {key: (record or {})["tokens"] for key, record in zip(settings.encode.keys, records, strict=True)}
            return Totals(first["documents"], first["input_bytes"], tokens)
        raise ValueError(
            f"{there[0]} is there already, and not from this input with these options: choose another --output-prefix, "
            "or replace it with --overwrite."
        )

    def _new_journal(self, folder: WorkFolder) -> Journal:
        folder.clear()
        keys = self.settings.encode.keys
        # The journal comes last: where there is one, there are its conditions.
        write_json(folder.conditions_path, self._conditions.described)
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
        self._conditions.check_unchanged()
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

    def _check_not_empty(self, totals: Totals) -> None:
        # A shard may well have nothing; the merged output is looked at when the shards are merged.
        if self.settings.shard:
            return
        names = list(map(name_of, self.settings.paths))
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
                "preparation": self._conditions.checksum(),
                "job": self._conditions.job_checksum(),
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
