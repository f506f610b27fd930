"""Our own checkpoints: opened as weights, and written from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megallm.checkpoint.boxes import WEIGHTS, declared_box
from megallm.checkpoint.commit import REPLACED, checkpoint_folder
from megallm.checkpoint.manifest import DTYPES, MANIFEST, DamagedError, read_manifest
from megallm.checkpoint.reading import OpenCheckpoint, open_checkpoint
from megallm.checkpoint.save import save_stream
from megallm.config import from_dict, to_dict
from megallm.config.tree import Config, ParallelConfig
from megallm.convert.ahead import read_ahead
from megallm.convert.model import Weights, check_layout, config_of, logical_shapes, rank_pieces
from megallm.convert.output import Progress, check_absent, new_folder, where_now
from megallm.convert.tokenizer_files import keep_companions, tokenizer_settings

KEPT = "huggingface"
"""The folder, beside checkpoints that were converted, with their tokenizer."""
_ONE_RANK = ParallelConfig()
_NUMBERED = re.compile(rf"iter_(\d{{7,}})(?:{REPLACED.pattern})?")


class _NativeTensors:
    """The weights of a checkpoint as `LogicalTensors`."""

    def __init__(self, checkpoint: OpenCheckpoint) -> None:
        self._checkpoint = checkpoint
        self.dtypes = {name: DTYPES[checkpoint.saved(WEIGHTS, name).dtype] for name in checkpoint.names()}

    def fill(self, name: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """As `LogicalTensors.fill`."""
        self._checkpoint.fill(WEIGHTS, name, offset, tensor)


@contextmanager
def open_native(folder: Path) -> Iterator[Weights]:
    """The weights of a checkpoint, for as long as the block lasts.

    Raises ValueError if it is damaged or its tensors are not those of its configuration.
    """
    with open_checkpoint(folder) as checkpoint:
        saved = from_dict(checkpoint.manifest.state["config"])
        config = config_of(saved.model, saved.data)
        shapes = logical_shapes(config)
        for name, shape in shapes.items():
            found = checkpoint.saved(WEIGHTS, name).shape
            if found != shape:
                raise ValueError(
                    f"{folder} holds {name} with shape {list(found)}, not {list(shape)} as its model wants"
                )
        origin = _origin(config, folder.parent)
        yield Weights(config, shapes, _NativeTensors(checkpoint), origin, checkpoint.manifest.iteration)


def _origin(config: Config, root: Path) -> Path | None:
    """The folder of the tokenizer, where it is one of Hugging Face's, or what was kept beside the checkpoint."""
    named = Path(config.data.tokenizer_model or "")
    if config.data.tokenizer_type == "HuggingFaceTokenizer" and named.is_dir():
        return named
    kept = where_now(root / KEPT)
    return kept if kept.is_dir() else None


def write_native(
    root: Path,
    weights: Weights,
    dtype: torch.dtype | None = None,
    *,
    parallel: ParallelConfig = _ONE_RANK,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes weights as a checkpoint under `root`, of their iteration, without optimizer; returns its folder.

    The tokenizer of a Hugging Face model is kept beside it, and the checkpoint's configuration names it there. `dtype`
    None keeps the types that the tensors have. There is a file for each tensor and pipeline rank of `parallel`.

    Raises ValueError if the checkpoint is there already and `overwrite` does not allow to replace it, if there are
    others or one that a run saved, if the layout does not fit the model, or it cannot be written.
    """
    final = checkpoint_folder(root, weights.iteration)
    _check_no_run(root, final)
    check_absent(final, overwrite)
    config = replace(weights.config, parallel=parallel)
    check_layout(config)
    # A checkpoint that is replaced keeps its tokenizer until the new one is there.
    is_new = not (root / KEPT).exists()
    if weights.origin is not None:
        if is_new:
            _keep(weights.origin, root)
        named = tokenizer_settings(weights.origin, root / KEPT)
        config = replace(config, data=replace(config.data, **named))
    types = {name: dtype or weights.tensors.dtypes[name] for name in weights.shapes}
    files = [
        [
            declared_box(WEIGHTS, piece.name, types[piece.name], piece.global_shape, piece.offset, piece.shape)
            for piece in pieces
        ]
        for pieces in rank_pieces(config)
    ]
    boxes = [box for file in files for box in file]
    progress = Progress(sum(box.tensor.nbytes for box in boxes), log)

    def read(number: int) -> torch.Tensor:
        box = boxes[number]
        tensor = torch.empty(box.tensor.shape, dtype=box.tensor.dtype)
        weights.tensors.fill(box.name, box.offset, tensor)
        return tensor

    with read_ahead([box.tensor.nbytes for box in boxes], read, progress.advance) as tensors:
        saved = save_stream(str(root), weights.iteration, files, tensors, {"config": to_dict(config)})
    if weights.origin is not None and not is_new:
        _keep(weights.origin, root)
    progress.finish()
    for note in saved.notes:
        log(note)
    return saved.folder


def newest_iteration(root: Path) -> int | None:
    """The highest iteration of which a checkpoint is under `root`; None where there is no checkpoint."""
    found = (_NUMBERED.fullmatch(path.parent.name) for path in root.glob(f"iter_*/{MANIFEST}"))
    return max((int(match[1]) for match in found if match), default=None)


def _check_no_run(root: Path, final: Path) -> None:
    """Raises ValueError where `final` would come among the checkpoints of a run or of another model."""
    newest = newest_iteration(root)
    if newest is None:
        return
    there = checkpoint_folder(root, newest)
    if there == final and not _is_of_run(final):
        return
    raise ValueError(
        f"{root} holds {'a run, up to' if _is_of_run(there) else 'another model,'} {there.name}: a converted one has "
        "no place there; give another folder to --save"
    )


def _is_of_run(folder: Path) -> bool:
    """Whether a checkpoint says more than a conversion does: where its run stood. A damaged one says nothing."""
    try:
        return read_manifest(folder).state.keys() != {"config"}
    except DamagedError:
        return False


def _keep(origin: Path, root: Path) -> None:
    """Puts the companions of a model beside its checkpoints, whole or not at all."""
    kept = root / KEPT
    if origin.absolute() == kept.absolute():
        return
    with new_folder(kept, 0, overwrite=True) as folder:
        keep_companions(origin, folder)
