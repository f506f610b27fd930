"""Our own checkpoints anew: with files for another layout, without the optimizer, in another type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megallm.checkpoint.boxes import WEIGHTS, LocalBox, declared_box
from megallm.checkpoint.commit import checkpoint_folder
from megallm.checkpoint.manifest import DTYPES
from megallm.checkpoint.reading import OpenCheckpoint, open_checkpoint
from megallm.checkpoint.save import save_stream
from megallm.config import from_dict, to_dict
from megallm.config.tree import ParallelConfig
from megallm.convert.ahead import read_ahead
from megallm.convert.model import check_layout, rank_pieces
from megallm.convert.native import newest_iteration
from megallm.convert.output import Progress, check_absent
from megallm.parameter import Piece


def relayout(
    folder: Path,
    root: Path,
    parallel: ParallelConfig,
    dtype: torch.dtype | None = None,
    *,
    weights_only: bool = False,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes the checkpoint in `folder` under `root`, a file for each tensor and pipeline rank of `parallel`.

    Any layout reads any other's files: what this changes is how many bytes a rank reads that are not its own. `dtype`
    is that of the weights, by default as they are; the optimizer's moments keep theirs. Returns the new folder.

    Raises ValueError if it is there already and `overwrite` does not allow to replace it, if a newer one is, if the
    layout does not fit the model, or the checkpoint is damaged or cannot be written.
    """
    with open_checkpoint(folder) as checkpoint:
        manifest = checkpoint.manifest
        final = checkpoint_folder(root, manifest.iteration)
        newest = newest_iteration(root)
        if newest is not None and newest > manifest.iteration:
            raise ValueError(
                f"{root} holds {checkpoint_folder(root, newest).name}, newer than {final.name}: whoever loads from "
                "there would still get the former; give another folder to --save"
            )
        check_absent(final, overwrite)
        config = replace(from_dict(manifest.state["config"]), parallel=parallel)
        check_layout(config)
        kinds = [WEIGHTS] if weights_only else list(dict.fromkeys(name.split("/")[0] for name in manifest.tensors))
        ranks = [_declare(checkpoint, pieces, kinds, dtype) for pieces in rank_pieces(config)]
        state = {"config": to_dict(config)} if weights_only else manifest.state | {"config": to_dict(config)}
        in_order = [box for boxes in ranks for box in boxes]
        sizes = [box.tensor.nbytes for box in in_order]
        progress = Progress(sum(sizes), log)
        with read_ahead(sizes, lambda number: _read(checkpoint, in_order[number]), progress.advance) as tensors:
            saved = save_stream(str(root), manifest.iteration, ranks, tensors, state)
        progress.finish()
        for note in saved.notes:
            log(note)
        return saved.folder


def _declare(
    checkpoint: OpenCheckpoint, pieces: Sequence[Piece], kinds: Sequence[str], dtype: torch.dtype | None
) -> list[LocalBox]:
    boxes = []
    for kind in kinds:
        # Frozen parameters have weights only.
        there = set(checkpoint.names(kind))
        for piece in pieces if kind == WEIGHTS else (piece for piece in pieces if piece.name in there):
            saved = checkpoint.saved(kind, piece.name)
            type_ = dtype if dtype is not None and kind == WEIGHTS else DTYPES[saved.dtype]
            boxes.append(declared_box(kind, piece.name, type_, saved.shape, piece.offset, piece.shape))
    return boxes


def _read(checkpoint: OpenCheckpoint, box: LocalBox) -> torch.Tensor:
    tensor = torch.empty(box.tensor.shape, dtype=box.tensor.dtype)
    checkpoint.fill(box.kind, box.name, box.offset, tensor)
    return tensor
