"""Our own checkpoints anew: with files for another layout, without the optimizer, in another type."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from megallm.checkpoint.boxes import WEIGHTS, LocalBox, declared_box
from megallm.checkpoint.commit import begin, checkpoint_folder, commit, temporary_folder, write_rank
from megallm.checkpoint.manifest import DTYPES
from megallm.checkpoint.reading import OpenCheckpoint, open_checkpoint
from megallm.checkpoint.shard_file import size_of
from megallm.config import from_dict, to_dict
from megallm.config.tree import Config, ParallelConfig
from megallm.convert.ahead import read_ahead
from megallm.convert.model import Rank, check_layout, config_of, positionless, rank_context
from megallm.convert.output import Progress, check_absent
from megallm.model.architecture import build_stage
from megallm.parameter import Piece, description_of
from megallm.plan.split import stage_layers


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

    Raises ValueError if it is there already and `overwrite` does not allow to replace it, if the layout does not fit
    the model, or the checkpoint is damaged or cannot be written.
    """
    with open_checkpoint(folder) as checkpoint:
        manifest = checkpoint.manifest
        final = checkpoint_folder(root, manifest.iteration)
        check_absent(final, overwrite)
        saved = from_dict(manifest.state["config"])
        config = replace(saved, parallel=parallel)
        check_layout(config)
        kinds = [WEIGHTS] if weights_only else list(dict.fromkeys(name.split("/")[0] for name in manifest.tensors))
        ranks = [_declare(checkpoint, pieces, kinds, dtype) for pieces in _pieces(config)]
        state = {"config": to_dict(config)} if weights_only else manifest.state | {"config": to_dict(config)}
        in_order = [box for boxes in ranks for box in boxes]
        sizes = [box.tensor.nbytes for box in in_order]
        progress = Progress(sum(sizes), log)
        token = secrets.token_hex(8)
        temporary = temporary_folder(final, token)
        try:
            notes = begin(temporary, sum(size_of(boxes) for boxes in ranks))
            with read_ahead(sizes, lambda number: _read(checkpoint, in_order[number]), progress.advance) as tensors:
                for rank, boxes in enumerate(ranks):
                    write_rank(temporary, boxes, rank, islice(tensors, len(boxes)))
            notes += commit(temporary, final, manifest.iteration, token, state, len(ranks))
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise ValueError(f"{final} cannot be written: {error.strerror}") from None
            raise
        progress.finish()
        for note in notes:
            log(note)
        return final


def _pieces(config: Config) -> Iterator[list[Piece]]:
    """What each rank of a layout saves, tensor ranks fastest."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    config = replace(config_of(config.model, config.data), parallel=parallel)
    stages = stage_layers(config)
    for pipeline_rank in range(pipeline):
        for tensor_rank in range(tensor):
            context = rank_context(torch.float32, torch.device("meta"), Rank(tensor_rank, tensor))
            pieces: dict[str, Piece] = {}
            for number in range(pipeline_rank, len(stages), pipeline):
                is_last = number == len(stages) - 1
                stage = build_stage(
                    positionless(config), stages[number], context, is_first=number == 0, is_last=is_last
                )
                for parameter in stage.parameters():
                    description = description_of(parameter)
                    if description.counts and ("tp" not in description.replicated_over or tensor_rank == 0):
                        pieces |= {piece.name: piece for piece in description.pieces if piece.shape[0]}
            yield list(pieces.values())


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
