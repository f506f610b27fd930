"""The record beside a dataset that says which tokenizer made it, so that training with another one is noticed."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megallm.data.text.inputs import RECORD_ENDING
from megallm.data.tokenizer.base import Tokenizer


def record_path(prefix: str | Path) -> Path:
    """Where the record of the dataset `<prefix>.bin`, `<prefix>.idx` stands."""
    return Path(f"{prefix}{RECORD_ENDING}")


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The record of a tokenizer: its kind, the SHA-256 of what decides the ids, vocabulary, special tokens, library."""
    checksum = hashlib.sha256(f"{tokenizer.kind}\n{tokenizer.vocab_size}\n".encode())
    checksum.update(tokenizer.definition())
    return {
        "kind": tokenizer.kind,
        "source": tokenizer.source,
        "library": tokenizer.library,
        "checksum": f"sha256:{checksum.hexdigest()}",
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": {
            role: {"text": tokenizer.token_text(token_id), "id": token_id}
            for role, token_id in tokenizer.special_tokens().items()
        },
        "sentinel_ids": list(tokenizer.sentinel_ids),
    }


def write_record(prefix: str | Path, record: dict[str, Any]) -> Path:
    """Write the record beside its place and move it there when it is whole; gives its path. Raises OSError."""
    path = record_path(prefix)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read_record(prefix: str | Path) -> dict[str, Any] | None:
    """The record of a dataset, or None where it has none, as Megatron's own have none.

    Raises ValueError if there is one that cannot be read.
    """
    path = record_path(prefix)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    kinds = {"kind": str, "checksum": str, "vocab_size": int, "special_tokens": dict}
    wrong = [key for key, kind in kinds.items() if not (isinstance(record, dict) and isinstance(record.get(key), kind))]
    if wrong:
        raise ValueError(f"{path} is no record of a tokenizer: {', '.join(wrong)} is missing or of another type.")
    return record


def check_record(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer that made a dataset with the one at hand. A dataset without a record passes.

    Raises ValueError if the two give other ids, or end documents with other tokens.
    """
    check_records([prefix], tokenizer)


def check_records(prefixes: Iterable[str | Path], tokenizer: Tokenizer) -> None:
    """`check_record` for each of many datasets; the tokenizer is described once."""
    here = None
    for prefix in prefixes:
        record = read_record(prefix)
        if record is not None:
            here = here or describe(tokenizer)
            _compare(prefix, record, here)


def _compare(prefix: str | Path, record: dict[str, Any], here: dict[str, Any]) -> None:
    differences = [
        f"{name} {record[key]} there, {here[key]} here"
        for key, name in (("kind", "kind"), ("vocab_size", "vocabulary"))
        if record[key] != here[key]
    ]
    there_end, here_end = (which["special_tokens"].get("end of document") for which in (record, here))
    if there_end != here_end:
        differences.append(f"end of document {_token(there_end)} there, {_token(here_end)} here")
    if not differences and record["checksum"] == here["checksum"]:
        return
    raise ValueError(
        f"{prefix} was made with another tokenizer than this run's: there {_name(record)}, here {_name(here)} "
        f"({'; '.join(differences) or 'the same size, but other content'}). Give the tokenizer that made the data, "
        f"or make the data again; without {record_path(prefix)} the data is taken as it is."
    )


def _name(record: dict[str, Any]) -> str:
    source = record.get("source")
    return f"{source or record['kind']} ({record['checksum'][:15]}...)"


def _token(token: Any) -> str:
    return f"{token['text']} = {token['id']}" if isinstance(token, dict) else "none"
