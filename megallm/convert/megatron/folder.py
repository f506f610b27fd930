"""Folders of Megatron-LM's `torch` format: a file `model_optim_rng.pt` for each tensor and pipeline rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megallm.config.tree import ModelConfig, ParallelConfig
from megallm.convert.ahead import read_ahead
from megallm.convert.megatron.arguments import (
    architecture_of,
    arguments_in,
    data_of,
    read_arguments,
    true_vocab_size,
    write_arguments,
)
from megallm.convert.megatron.distributed import METADATA, open_distributed_folder
from megallm.convert.megatron.names import (
    TRANSFORMER_ENGINE,
    first_tensors,
    in_engine,
    last_tensors,
    layer_tensors,
    padded_vocab_size,
    stack_of,
)
from megallm.convert.model import Weights, check_layout, config_of, logical_shapes
from megallm.convert.output import Progress, new_folder
from megallm.convert.pickled import Made, Named
from megallm.convert.raw import RawFiles, RawTensor
from megallm.convert.safetensors_file import Declared
from megallm.convert.stored import Stored, StoredTensors, gather
from megallm.convert.tokenizer_files import has_tokenizer, keep_companions
from megallm.convert.torch_file import read_torch_file, write_torch_file
from megallm.plan.split import stage_layers

TRACKER, FILE, RELEASE, KEPT = "latest_checkpointed_iteration.txt", "model_optim_rng.pt", "release", "huggingface"
DIVISIBLE_BY = 128
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER = re.compile(r"(?:decoder|encoder)\.layers\.(\d+)\.(.*)")


class Chunk(NamedTuple):
    """The part of the model that a rank has as one virtual stage, its tensors by their names."""

    stage: int
    tensor_rank: int
    tensors: dict[str, RawTensor]


def find_iteration(root: Path, iteration: int | None) -> Path:
    """The folder of an iteration under `root`, by default the one that the tracker names, or `root` itself.

    Raises ValueError where there is none.
    """
    if any(root.glob("mp_rank_*")) or (root / ".metadata").exists():
        return root
    if iteration is None:
        try:
            named = (root / TRACKER).read_text().strip()
        except OSError:
            raise ValueError(
                f"{root} holds no Megatron checkpoint: neither {TRACKER}, mp_rank_00/{FILE} nor .metadata"
            ) from None
        folder = root / (named if named == RELEASE else f"iter_{int(named):07d}" if named.isdigit() else named)
    else:
        folder = root / f"iter_{iteration:07d}"
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "nothing"
        raise ValueError(f"{folder} is not there, but {there}")
    return folder


@contextmanager
def open_torch_folder(folder: Path, asked_vocab_size: int | None = None) -> Iterator[Weights]:
    """The model in the folder of one iteration, for as long as the block lasts.

    `asked_vocab_size` is that of the vocabulary without padding; by default what the checkpoint says, or its padded
    size where it says nothing.

    Raises ValueError for what is wrong: a missing rank, a file that holds anything but data, a feature that megallm
    lacks, a tensor that is missing, surplus or of another shape.
    """
    contents = _read_ranks(folder)
    given, iteration = _arguments_of(contents, folder)
    num_stages, chunks = _chunks(contents, folder)
    model, notes = _model(given, chunks, asked_vocab_size)
    origin = folder.parent / KEPT
    config = config_of(model, data_of(given, origin))
    shapes = logical_shapes(config)
    stored = list(_match(folder, config.model, shapes, chunks, num_stages))
    with RawFiles() as files:
        tensors = StoredTensors(files, stored, shapes)
        yield Weights(config, shapes, tensors, origin if origin.is_dir() else None, iteration, notes=notes)


def _read_ranks(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What each (tensor, pipeline) rank's file holds."""
    found = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} is not a rank of a dense model: experts are something that megallm does not have")
        content = read_torch_file(path / FILE)
        if not isinstance(content, dict):
            raise ValueError(f"{path / FILE} does not hold a dictionary")
        found[int(match[1]), int(match[2] or 0)] = content
    if not found:
        raise ValueError(f"{folder} holds no mp_rank_00")
    tensor, pipeline = (max(rank[axis] for rank in found) + 1 for axis in (0, 1))
    missing = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in found]
    if missing:
        raise ValueError(
            f"{folder} lacks mp_rank_{missing[0][0]:02d}_{missing[0][1]:03d}, one of {tensor} tensor and {pipeline} "
            "pipeline ranks"
        )
    return found


def _arguments_of(contents: Mapping[tuple[int, int], dict[str, Any]], folder: Path) -> tuple[dict[str, Any], int]:
    given, iteration = arguments_in(contents[0, 0], folder)
    for name, axis in (("tensor_model_parallel_size", 0), ("pipeline_model_parallel_size", 1)):
        there = max(rank[axis] for rank in contents) + 1
        if given.get(name, there) != there:
            raise ValueError(f"{folder} was saved with {name} {given[name]}, but ranks 0 to {there - 1} are there")
    return given, iteration


def _chunks(contents: Mapping[tuple[int, int], dict[str, Any]], folder: Path) -> tuple[int, list[Chunk]]:
    """Number of stages, and all their chunks: stage s is virtual stage s div p of pipeline rank s mod p."""
    pipeline = max(rank[1] for rank in contents) + 1
    chunks = []
    for (tensor_rank, pipeline_rank), content in contents.items():
        names = (
            ["model"]
            if "model" in content
            else sorted((name for name in content if re.fullmatch(r"model\d+", name)), key=lambda name: int(name[5:]))
        )
        if not names:
            raise ValueError(f"the file of rank {tensor_rank}, {pipeline_rank} in {folder} holds no model")
        for virtual, name in enumerate(names):
            tensors = {}
            if not isinstance(content[name], dict):
                raise ValueError(
                    f"{name} of rank {tensor_rank}, {pipeline_rank} in {folder} is no dictionary of tensors"
                )
            for key, value in content[name].items():
                if isinstance(value, RawTensor) and isinstance(key, str):
                    tensors[in_engine(key)] = value
                elif not str(key).endswith("_extra_state"):
                    raise ValueError(
                        f"{key} in {folder} is no tensor of weights: is it a model from before Megatron core?"
                    )
            chunks.append(Chunk(virtual * pipeline + pipeline_rank, tensor_rank, tensors))
    return max(chunk.stage for chunk in chunks) + 1, chunks


def _model(
    given: Mapping[str, Any], chunks: list[Chunk], asked_vocab_size: int | None
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model of the arguments, and sentences about it for the user."""
    tables = [
        chunk.tensors["embedding.word_embeddings.weight"]
        for chunk in chunks
        if chunk.stage == 0 and "embedding.word_embeddings.weight" in chunk.tensors
    ]
    padded = sum(table.shape[0] for table in tables)
    vocab_size, notes = true_vocab_size(given, padded, asked_vocab_size)
    architecture = architecture_of(name for chunk in chunks for name in chunk.tensors)
    return read_arguments(given, vocab_size, architecture), notes


def _match(
    folder: Path, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], chunks: list[Chunk], num_stages: int
) -> Iterator[tuple[Stored, RawTensor]]:
    """Every tensor of the model with its place."""
    tp = max(chunk.tensor_rank for chunk in chunks) + 1
    numbers = {
        chunk.stage: 1 + max((int(m[1]) for name in chunk.tensors if (m := _LAYER.match(name))), default=-1)
        for chunk in chunks
    }
    if sum(numbers.values()) != model.num_layers:
        raise ValueError(f"{folder} holds {sum(numbers.values())} layers, but its arguments say {model.num_layers}")
    problems: list[str] = []
    for chunk in chunks:
        first = sum(numbers[stage] for stage in range(chunk.stage))
        padded = tp * max((raw.shape[0] for name, raw in chunk.tensors.items() if name in _OF_VOCABULARY), default=0)
        wanted = chunk_tensors(
            model,
            shapes,
            range(first, first + numbers[chunk.stage]),
            chunk.stage,
            num_stages,
            padded,
            tp,
            chunk.tensor_rank,
        )
        left = dict(chunk.tensors)
        for stored in wanted:
            raw = left.pop(stored.name, None)
            if raw is None:
                problems.append(f"{stored.name} of shape {list(stored.shape)} is missing on stage {chunk.stage}")
            elif raw.shape != stored.shape:
                problems.append(
                    f"{stored.name} has shape {list(raw.shape)}, not {list(stored.shape)} as its arguments say"
                )
            else:
                yield stored, raw
        problems += [f"{name} of shape {list(raw.shape)} is not of this model" for name, raw in left.items()]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder} does not hold the model of its arguments: {'; '.join(problems[:3])}{more}")


_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def chunk_tensors(
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    layers: range,
    stage: int,
    num_stages: int,
    padded_size: int,
    tp: int,
    rank: int,
) -> list[Stored]:
    """What a tensor rank has of a stage, under Transformer Engine's names with local numbers of layers."""
    found = list(first_tensors(model, shapes, padded_size, tp, rank)) if stage == 0 else []
    for local, layer in enumerate(layers):
        found += [
            replace(stored, name=f"{stack_of(model)}.layers.{local}.{stored.name}")
            for stored in layer_tensors(model, shapes, layer, tp, rank)
        ]
    if stage == num_stages - 1:
        repeats = model.tie_embeddings and num_stages > 1
        found += last_tensors(model, shapes, padded_size, tp, rank, repeats_embedding=repeats)
    return [replace(stored, name=in_engine(stored.name)) for stored in found]


def write_torch_folder(
    final: Path,
    weights: Weights,
    parallel: ParallelConfig,
    dtype: torch.dtype | None = None,
    *,
    implementation: str = TRANSFORMER_ENGINE,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a model as a `release` for Megatron-LM, in a layout, with the names of one of its implementations.

    Raises ValueError if Megatron-LM or the layout does not fit the model, or the folder cannot be written.
    """
    arguments = write_arguments(weights.config.model)
    check_layout(replace(weights.config, parallel=parallel))
    plan = list(_plan(weights, parallel, dtype))
    in_order = [pair for _, _, chunks in plan for chunk in chunks for pair in chunk]
    settings = arguments | _layout(weights, parallel, in_order[0][1].dtype, implementation)
    total = sum(one.num_bytes for _, one in in_order)
    progress = Progress(total, log)

    def read(number: int) -> torch.Tensor:
        stored, one = in_order[number]
        return gather(stored, weights.tensors, one.dtype)

    with new_folder(final, total, overwrite) as folder:
        with read_ahead([one.num_bytes for _, one in in_order], read, progress.advance) as tensors:
            for tensor_rank, pipeline_rank, chunks in plan:
                pipeline = f"_{pipeline_rank:03d}" if parallel.pipeline_model_parallel_size > 1 else ""
                place = folder / RELEASE / f"mp_rank_{tensor_rank:02d}{pipeline}"
                place.mkdir(parents=True)
                _write_rank(place / FILE, chunks, tensors, settings, implementation)
        if weights.origin is not None and has_tokenizer(weights.origin):
            (folder / KEPT).mkdir()
            keep_companions(weights.origin, folder / KEPT)
        (folder / TRACKER).write_text(RELEASE)
    progress.finish()


_Plan = list[list[tuple[Stored, Declared]]]


def _plan(weights: Weights, parallel: ParallelConfig, dtype: torch.dtype | None) -> Iterator[tuple[int, int, _Plan]]:
    """(tensor rank, pipeline rank, its chunks' tensors) of each file."""
    model, shapes = weights.config.model, weights.shapes
    assert model.vocab_size, "the configuration is resolved"
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    padded = padded_vocab_size(model.vocab_size, DIVISIBLE_BY, tp)
    stages = stage_layers(replace(weights.config, parallel=parallel))
    for pipeline_rank in range(pp):
        for tensor_rank in range(tp):
            chunks = []
            for stage in range(pipeline_rank, len(stages), pp):
                stored = chunk_tensors(model, shapes, stages[stage], stage, len(stages), padded, tp, tensor_rank)
                chunks.append([(one, _declared(one, stage, weights, dtype)) for one in stored])
            yield tensor_rank, pipeline_rank, chunks


def _declared(stored: Stored, stage: int, weights: Weights, dtype: torch.dtype | None) -> Declared:
    widest = max((weights.tensors.dtypes[part.name] for part in stored.parts), key=lambda kind: kind.itemsize)
    return Declared(f"{stage}/{stored.name}", dtype or widest, stored.shape)


def _layout(weights: Weights, parallel: ParallelConfig, dtype: torch.dtype, implementation: str) -> dict[str, Any]:
    """What Megatron keeps of a run's arguments beside those of the model."""
    virtual, tensor = parallel.num_virtual_stages_per_pipeline_rank, parallel.tensor_model_parallel_size
    vocab_size = weights.config.model.vocab_size
    assert vocab_size, "the configuration is resolved"
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "padded_vocab_size": padded_vocab_size(vocab_size, DIVISIBLE_BY, tensor),
        "seq_length": weights.config.data.seq_length,
        "params_dtype": Named(str(dtype)),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "transformer_impl": implementation,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _write_rank(
    path: Path, chunks: _Plan, tensors: Iterator[torch.Tensor], settings: Mapping[str, Any], implementation: str
) -> None:
    """Writes the file of a rank, whose tensors are the next ones."""
    declared = [one for chunk in chunks for _, one in chunk]

    def content(places: Mapping[str, Any]) -> dict[str, Any]:
        models = [{_name(stored.name, implementation): places[one.name] for stored, one in chunk} for chunk in chunks]
        keys = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
        return {
            "args": Made("argparse.Namespace", (), settings),
            "checkpoint_version": 3.0,
            "iteration": 0,
            **dict(zip(keys, models, strict=True)),
        }

    write_torch_file(path, content, declared, islice(tensors, len(declared)))


def _name(name: str, implementation: str) -> str:
    if implementation == TRANSFORMER_ENGINE:
        return name
    return name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    )


def open_megatron(folder: Path, asked_vocab_size: int | None = None) -> AbstractContextManager[Weights]:
    """The model in the folder of one iteration, of either format, for as long as the block lasts."""
    if (folder / METADATA).exists():
        return open_distributed_folder(folder, asked_vocab_size)
    return open_torch_folder(folder, asked_vocab_size)
