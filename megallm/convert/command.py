"""What `tools/convert_checkpoint.py` does: any format opened, any written, two compared, and the work checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megallm.checkpoint.boxes import WEIGHTS
from megallm.checkpoint.inspection import change_of_values, elements_differ, reader, split_name
from megallm.checkpoint.load import newest_checkpoint
from megallm.checkpoint.manifest import MANIFEST
from megallm.checkpoint.reading import open_checkpoint
from megallm.config.tree import ParallelConfig
from megallm.convert.compare import compare, settings_apart
from megallm.convert.huggingface import CONFIG, open_folder, write_folder
from megallm.convert.megatron.distributed import METADATA
from megallm.convert.megatron.folder import find_iteration, open_megatron, write_torch_folder
from megallm.convert.model import Weights
from megallm.convert.native import open_native, write_native
from megallm.convert.output import Progress, log_line, where_now
from megallm.convert.relayout import relayout
from megallm.convert.verify import BOUNDS, has_transformers, judge, our_logits, their_logits, tokens_for
from megallm.file_lock import own_folder


@dataclass(frozen=True)
class Place:
    """A model in one of the formats "hf", "megallm" and "megatron".

    Attributes:
        iteration: names one of several checkpoints there, by default the newest.
        true_vocab_size: of a Megatron model, whose own is padded, where the checkpoint does not say it.
    """

    kind: str
    path: Path
    iteration: int | None = None
    true_vocab_size: int | None = None

    def check_kind(self, flag: str) -> None:
        """Raises ValueError where the folder plainly holds another format than `flag` says."""
        patterns = {
            "hf": (CONFIG,),
            "megallm": (MANIFEST, f"iter_*/{MANIFEST}"),
            "megatron": ("mp_rank_*", "*/mp_rank_*", METADATA, f"*/{METADATA}"),
        }
        held = [kind for kind, names in patterns.items() if any(any(self.path.glob(name)) for name in names)]
        if held and self.kind not in held:
            raise ValueError(f"{self.path} holds a model in the format of {flag} {held[0]}, not of {flag} {self.kind}")

    def open(self) -> AbstractContextManager[Weights]:
        """The model, for as long as the block lasts. Raises ValueError for what is wrong with it."""
        if self.kind == "hf":
            return open_folder(self.path)
        if self.kind == "megatron":
            return open_megatron(find_iteration(where_now(self.path), self.iteration), self.true_vocab_size)
        return open_native(newest_checkpoint(str(self.path), self.iteration))


@dataclass(frozen=True)
class Output:
    """How a model is written.

    Attributes:
        dtype: of the weights; None keeps theirs.
        parallel: the layout for whose ranks files are cut.
        implementation: of Megatron, whose names are used.
        overwrite: whether what is there may be replaced.
        max_shard_bytes: size of a Hugging Face file.
        weights_only: whether a checkpoint that is written from another leaves the optimizer behind.
    """

    dtype: torch.dtype | None
    parallel: ParallelConfig
    implementation: str
    overwrite: bool
    max_shard_bytes: int
    weights_only: bool


def convert(source: Place, target: Place, output: Output) -> Place:
    """Writes the model at `source` to `target`; returns where exactly it is.

    Raises ValueError for what is wrong with the model or the place, which a running job may have for itself.
    """
    target.check_kind("--to")
    if target.kind != "megallm" or not target.path.is_dir():
        return _convert(source, target, output)
    try:
        with own_folder(target.path, log_line):
            return _convert(source, target, output)
    except OSError as error:
        raise ValueError(f"{target.path} cannot be written: {error.strerror}") from None


def _convert(source: Place, target: Place, output: Output) -> Place:
    if source.kind == target.kind == "megallm":
        folder = relayout(
            newest_checkpoint(str(source.path), source.iteration),
            target.path,
            output.parallel,
            output.dtype,
            weights_only=output.weights_only,
            overwrite=output.overwrite,
            log=log_line,
        )
        return replace(target, path=folder)
    with source.open() as weights:
        for note in weights.notes:
            log_line(note)
        if target.kind == "hf":
            write_folder(
                target.path,
                weights,
                output.dtype,
                overwrite=output.overwrite,
                max_shard_bytes=output.max_shard_bytes,
                log=log_line,
            )
            return target
        if target.kind == "megatron":
            write_torch_folder(
                target.path,
                weights,
                output.parallel,
                output.dtype,
                implementation=output.implementation,
                overwrite=output.overwrite,
                log=log_line,
            )
            return target
        folder = write_native(
            target.path, weights, output.dtype, parallel=output.parallel, overwrite=output.overwrite, log=log_line
        )
        return replace(target, path=folder)


def report_comparison(one: Place, other: Place, log: Callable[[str], None]) -> bool:
    """Logs how two models differ, with the largest difference of each tensor that does; returns whether they do."""
    with one.open() as first, other.open() as second:
        apart = settings_apart(first.config, second.config)
        for sentence in apart:
            log(sentence)
        progress = Progress(_num_bytes(second), log_line)
        differing = 0
        for name, change in compare(first, second, progress.advance):
            differing += 1
            log(
                f"{name}: {elements_differ(change.num_elements)}, at most by {change.largest:.3e}, "
                f"at {list(change.element)}"
            )
        progress.finish()
        log(f"{differing} of {len(first.shapes)} tensors {'differs' if differing == 1 else 'differ'}")
        return bool(differing or apart)


def check(
    source: Place, target: Place, dtype: torch.dtype | None, text: Path | None, log: Callable[[str], None]
) -> None:
    """Reads what was written and compares it with its source: tensor by tensor, bit for bit after rounding, and where
    one of them is a Hugging Face model and the library is there, by the logits that both give to a text.

    Raises ValueError where they are not the same within `BOUNDS`.
    """
    with source.open() as first, target.open() as second:
        progress = Progress(_num_bytes(second), log_line)
        for name, change in compare(first, second, progress.advance, rounded_to=dtype):
            raise ValueError(f"{name} differs by {change.largest:.3e} at {list(change.element)} after conversion")
        log(f"verified tensor by tensor: all {len(first.shapes)} are equal")
        if source.kind == target.kind == "megallm":
            _check_optimizer(source, target, log)
        if "hf" not in (source.kind, target.kind):
            return
        if first.fresh or second.fresh:
            log("one of them comes without its heads: logits were not compared")
            return
        if not has_transformers():
            log("transformers is not installed: logits were not compared")
            return
        tokens = tokens_for(first.config, first.origin, text)
        architecture = first.config.model.architecture
        verdict = judge(_logits(source, first, tokens), _logits(target, second, tokens), tokens, architecture)
        bound = BOUNDS[dtype]
        log(
            f"verified on {verdict.num_tokens} tokens: largest difference of logits {verdict.largest:.2e}, "
            f"{verdict.share:.2e} of the largest (bound {bound:.0e}); loss {verdict.losses[0]:.6f} and "
            f"{verdict.losses[1]:.6f}"
        )
        if not verdict.share <= bound:
            raise ValueError(f"logits differ by {verdict.share:.2e} of the largest, more than the bound of {bound:.0e}")


def _check_optimizer(source: Place, target: Place, log: Callable[[str], None]) -> None:
    """Raises ValueError where a checkpoint that was written from another holds other moments of the optimizer."""
    with (
        open_checkpoint(newest_checkpoint(str(source.path), source.iteration)) as first,
        open_checkpoint(newest_checkpoint(str(target.path))) as second,
    ):
        moments = [name for name in second.manifest.tensors if split_name(name)[0] != WEIGHTS]
        for name in moments:
            shape = second.manifest.tensors[name].shape
            change = change_of_values(shape, reader(first, name), reader(second, name))
            if change is not None:
                raise ValueError(f"{name} differs by {change.largest:.3e} at {list(change.element)} after conversion")
    if moments:
        log(f"verified the optimizer: all {len(moments)} are equal")


def _logits(place: Place, weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    return their_logits(place.path, tokens) if place.kind == "hf" else our_logits(weights, tokens)


def _num_bytes(weights: Weights) -> int:
    return sum(
        torch.Size(shape).numel() * weights.tensors.dtypes[name].itemsize for name, shape in weights.shapes.items()
    )
