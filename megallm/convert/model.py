"""What a model of ours is made of, without making it: its logical tensors, and which of them a rank of a layout has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megallm.communication import Group, Transport
from megallm.config import resolve
from megallm.config.dictionary import build, read_tree
from megallm.config.tree import Config, DataConfig, ModelConfig, TrainingConfig
from megallm.convert.stored import LogicalTensors
from megallm.layers.context import LayoutContext
from megallm.model.architecture import build_stage
from megallm.parameter import Description, Piece, description_of
from megallm.plan.rules_values import RANGES
from megallm.plan.split import stage_layers
from megallm.plan.validate import validate


@dataclass(frozen=True)
class Weights:
    """A model that was opened, wherever it lies.

    Attributes:
        config: of the model and its tokenizer, resolved.
        shapes: of its logical tensors, in the order of the model.
        tensors: reads them.
        origin: folder with the files of its tokenizer and other files of Hugging Face's that go with it; or None.
        iteration: steps of training that are in it.
        fresh: tensors that were not there, and are given their initial values.
        notes: sentences that whoever reads the model should be told.
    """

    config: Config
    shapes: dict[str, tuple[int, ...]]
    tensors: LogicalTensors
    origin: Path | None = None
    iteration: int = 0
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Rank(NamedTuple):
    """A place in tensor parallelism."""

    rank: int
    size: int


ALONE = Rank(0, 1)


def model_of(values: Mapping[str, Any], whose: str) -> ModelConfig:
    """Our settings of a foreign model, by their names.

    Raises ValueError, beginning with `whose`, for all that are of a wrong type, or numbers that cannot be.
    """
    read, problems = read_tree({"model": dict(values)})
    problems = [problem.removeprefix("model.") for problem in problems] or [
        f"{path.removeprefix('model.')} is {value}, and must be {RANGES[path]}"
        for path, value in read.items()
        if path in RANGES and value is not None and value not in RANGES[path]
    ]
    if problems:
        raise ValueError(f"{whose} describes none that can be: {'; '.join(problems)}")
    return build(read).model


def config_of(model: ModelConfig, data: DataConfig | None = None) -> Config:
    """A configuration of `model` alone, resolved: what a checkpoint of weights says of itself."""
    data = data or DataConfig()
    if not data.seq_length:
        data = replace(data, seq_length=min(model.max_position_embeddings or 1, 2048))
    training = TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=1)
    return resolve(Config(model=model, data=data, training=training), 1)


def rank_context(dtype: torch.dtype, device: torch.device, place: Rank = ALONE) -> LayoutContext:
    """One process that computes for itself, or stands for a tensor rank without computing."""
    group = Group(tuple(range(place.size)), place.rank, Transport(None))
    return LayoutContext(tp=group, sequence_parallel=False, dtype=dtype, device=device, seed=0)


def logical_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all logical tensors of a model, in the order of the model. Takes no memory."""
    return {piece.name: piece.global_shape for described in descriptions(config) for piece in described.pieces}


def descriptions(config: Config) -> list[Description]:
    """Of all parameters of a model, whole, in the order of the model. Takes no memory."""
    context = rank_context(torch.float32, torch.device("meta"))
    stage = build_stage(positionless(config), range(config.model.num_layers), context, is_first=True, is_last=True)
    return [description_of(parameter) for parameter in stage.parameters()]


def positionless(config: Config) -> Config:
    """`config` without tables of positions, which are no parameters.

    To compute them without memory, torch would load its compiler.
    """
    if config.model.position_embedding_type == "learned_absolute":
        return config
    return replace(config, model=replace(config.model, position_embedding_type="none"))


def rank_pieces(config: Config) -> Iterator[list[Piece]]:
    """What each rank of a layout saves of a model, tensor ranks fastest. Takes no memory."""
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


def check_layout(config: Config) -> None:
    """Raises ValueError, with every problem, where a layout does not fit the model."""
    parallel = config.parallel
    world_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    flags = {"--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--num-virtual-stages-per-pipeline-rank"}
    problems = [
        str(problem)
        for problem in validate(replace(config_of(config.model, config.data), parallel=parallel), world_size)
        if flags & set(problem.flags) and "--seq-length" not in problem.flags
    ]
    if problems:
        raise ValueError("; ".join(problems))
