"""Where the scalars of a run go besides the screen: a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megallm.config import to_dict
from megallm.config.report import why_unreadable
from megallm.config.tree import Config

# Bytes within which the last line of a file begins.
_LONGEST_LINE = 2**20


class Writer(Protocol):
    """Takes scalars by name. What several calls say of one iteration belongs together."""

    def write(self, iteration: int, scalars: dict[str, Any]) -> None:
        """Takes the scalars of a step or of an evaluation after it."""

    def write_text(self, iteration: int, name: str, text: str) -> None:
        """Takes a text."""

    def close(self) -> None:
        """Writes what is left."""


class JsonLines:
    """Appends one JSON object per line; complete after each line. What is not finite is written as null."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a")  # noqa: SIM115 (open for the whole run)
        if Path(path).is_file():
            _end_line(path)

    def write(self, iteration: int, scalars: dict[str, Any]) -> None:
        record = {"iteration": iteration, **scalars}
        # JSON knows no infinity and no NaN.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def write_text(self, iteration: int, name: str, text: str) -> None:
        self.write(iteration, {name: text})

    def close(self) -> None:
        self._file.close()


def _end_line(path: str) -> None:
    """Ends a last line that lacks its newline alone, and takes away what a full disk or a power cut has left of one."""
    with open(path, "rb+") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE)
        file.seek(begin)
        tail = file.read()
        start = tail.rfind(b"\n") + 1
        if not tail[start:]:
            return
        # Where its start is not seen nobody knows whether it is whole: it stays, and what follows has its own line.
        if (begin > 0 and start == 0) or _is_json(tail[start:]):
            file.write(b"\n")
        else:
            file.truncate(begin + start)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class TensorBoard:
    """Event files in a folder, of every `interval`-th iteration."""

    def __init__(self, folder: str, interval: int, queue_size: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._interval = interval
        self._writer: Any = SummaryWriter(folder, max_queue=queue_size)

    def write(self, iteration: int, scalars: dict[str, Any]) -> None:
        if iteration % self._interval == 0:
            for name, value in scalars.items():
                if name == "consumed_samples":
                    continue
                self._writer.add_scalar(name, value, iteration)

    def write_text(self, iteration: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, iteration)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, with the whole configuration."""

    def __init__(self, config: Config) -> None:
        logging = config.logging
        folder = logging.wandb_save_dir or os.path.join(config.checkpoint.save or ".", "wandb")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._run = import_wandb().init(
            project=logging.wandb_project,
            name=logging.wandb_exp_name,
            entity=logging.wandb_entity,
            dir=folder,
            config=to_dict(config),
        )

    def write(self, iteration: int, scalars: dict[str, Any]) -> None:
        self._run.log(scalars, step=iteration)

    def write_text(self, iteration: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=iteration)

    def close(self) -> None:
        self._run.finish()


class GivesUp:
    """A writer to the disk that is told of once and left out from where the disk does not take it: a run goes on."""

    def __init__(self, flag: str, path: str, make: Callable[[], Writer]) -> None:
        self._where = f"{flag} {path}"
        self._writer: Writer | None = None
        self._try(lambda: setattr(self, "_writer", make()))

    def write(self, iteration: int, scalars: dict[str, Any]) -> None:
        if (writer := self._writer) is not None:
            self._try(lambda: writer.write(iteration, scalars))

    def write_text(self, iteration: int, name: str, text: str) -> None:
        if (writer := self._writer) is not None:
            self._try(lambda: writer.write_text(iteration, name, text))

    def close(self) -> None:
        if (writer := self._writer) is not None:
            self._try(writer.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            self._writer = None
            print(f"> {self._where} cannot be written to: {why_unreadable(error)}; the run goes on without", flush=True)


def import_wandb() -> Any:
    """The package of Weights & Biases, an optional one. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError(
            "--wandb-project needs the package wandb, which is not installed: pip install wandb, or use "
            "--tensorboard-dir or --metrics-jsonl"
        ) from None


def build_writers(config: Config) -> list[Writer]:
    """All that a configuration asks for."""
    logging = config.logging
    writers: list[Writer] = []
    if logging.metrics_jsonl:
        path = logging.metrics_jsonl
        writers.append(GivesUp("--metrics-jsonl", path, lambda: JsonLines(path)))
    if logging.tensorboard_dir:
        folder, interval, queue_size = (
            logging.tensorboard_dir,
            logging.tensorboard_log_interval,
            logging.tensorboard_queue_size,
        )
        writers.append(GivesUp("--tensorboard-dir", folder, lambda: TensorBoard(folder, interval, queue_size)))
    if logging.wandb_project:
        writers.append(WeightsAndBiases(config))
    return writers
