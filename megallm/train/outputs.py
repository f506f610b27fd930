"""Places to write to are tried before the first step: a run must not end at its first save."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megallm.checkpoint.commit import make_folder
from megallm.config.report import why_unreadable
from megallm.config.tree import Config
from megallm.train.writers import import_wandb


def try_outputs(config: Config) -> None:
    """Makes the folders that a run writes to, and writes there.

    Raises ValueError naming the flag and the place where that fails, or a package that is missing.
    """
    checkpoint, logging = config.checkpoint, config.logging
    if logging.wandb_project:
        import_wandb()
    folders = {"--save": checkpoint.save, "--save-hf": checkpoint.save_hf, "--tensorboard-dir": logging.tensorboard_dir}
    folders["--wandb-save-dir"] = logging.wandb_save_dir
    files = {"--metrics-jsonl": logging.metrics_jsonl, "--timeline": logging.timeline}
    for flag, file in files.items():
        if file is not None and flag == "--metrics-jsonl" and Path(file).is_dir():
            raise ValueError(f"{flag} {file} is a folder; name a file in it")
        folders[flag] = None if file is None else str(Path(file).parent)
    for flag, folder in folders.items():
        if folder is None:
            continue
        try:
            make_folder(Path(folder))
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"{flag}: {folder} cannot be written to: {why_unreadable(error)}") from error
    if logging.metrics_jsonl is not None:
        try:
            # As it will be opened: to append, after a look at its end. Without a buffer a pipe does as well.
            with open(logging.metrics_jsonl, "ab+", buffering=0):
                pass
        except OSError as error:
            raise ValueError(
                f"--metrics-jsonl {logging.metrics_jsonl} cannot be written to: {why_unreadable(error)}"
            ) from error
