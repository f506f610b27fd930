"""A trained model and its tokenizer, taken from a checkpoint in any layout: for those who only read it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megallm.checkpoint.load import newest_checkpoint
from megallm.checkpoint.manifest import read_manifest
from megallm.config import from_dict
from megallm.config.report import printable
from megallm.config.tree import CheckpointConfig, Config, LoggingConfig, OptimizerConfig, ParallelConfig
from megallm.data.tokenizer.base import Tokenizer
from megallm.data.tokenizer.record import describe
from megallm.plan.rules_data import data_sources
from megallm.train.datasets import build_tokenizer_of
from megallm.train.engine import Model, build_model
from megallm.train.processes import joined_processes
from megallm.train.resume import load_weights
from megallm.train.tasks.gpt import GPTTask


@dataclass(frozen=True)
class Placement:
    """How a model is laid out; more processes than it takes hold copies of it."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    micro_batch_size: int = 1
    device: str = "auto"


@contextmanager
def trained_model(
    load: str, placement: Placement, tokenizer_model: str | None = None
) -> Iterator[tuple[Model, Tokenizer]]:
    """The newest checkpoint in the folder `load`, or the checkpoint that it is itself. Called by all ranks.

    The model's shape and its tokenizer are those that it was saved with; `tokenizer_model` says where the tokenizer is
    now, if it has moved. Sequences are not cut over the tensor ranks.

    Raises ValueError, the same on every rank, where there is none, or it was not trained on text.
    """
    folder = newest_checkpoint(load)
    state = read_manifest(folder).state
    config = _placed(from_dict(state["config"]), placement)
    if config.model.architecture != "gpt":
        raise ValueError(
            f"{folder} holds a {config.model.architecture}, which finds masked words; a text is continued and its "
            "perplexity told by models that predict the next token: give a checkpoint of pretrain_gpt.py"
        )
    if config.data.tokenizer_type in (None, "NullTokenizer"):
        raise ValueError(
            f"{folder} holds a model that was trained on numbers, without a tokenizer of text: it neither continues a "
            "text nor tells how well it predicts one"
        )
    config = replace(config, data=replace(config.data, tokenizer_model=tokenizer_model or config.data.tokenizer_model))
    with joined_processes(config) as (config, mesh):
        tokenizer = build_tokenizer_of(config)
        assert tokenizer is not None, "the configuration names a tokenizer of text"
        if tokenizer.vocab_size > (config.model.vocab_size or 0):
            raise ValueError(
                f"the tokenizer {config.data.tokenizer_model} has {tokenizer.vocab_size} tokens, the model knows "
                f"{config.model.vocab_size}: give the tokenizer that it was trained with as --tokenizer-model"
            )
        _check_same_tokens(folder, state, tokenizer, config.data.tokenizer_model)
        model = build_model(config, GPTTask.from_config(config), mesh)
        load_weights(model, folder)
        yield model, tokenizer


def _check_same_tokens(folder: Path, state: dict[str, Any], tokenizer: Tokenizer, named: str | None) -> None:
    """Raises ValueError where the numbers of tokens stand for other texts than in the training, as far as is known."""
    there, here = (state.get("data_order") or {}).get("tokenizer"), describe(tokenizer)["checksum"]
    if there and there != here:
        raise ValueError(
            f"{folder} was trained with another tokenizer ({printable(str(there))[:15]}...) than {named} "
            f"({here[:15]}...), whose numbers stand for other texts: give that one as --tokenizer-model"
        )


def _placed(config: Config, placement: Placement) -> Config:
    """The model and data of `config`; how its run was laid out, how it learned and what it wrote is left behind."""
    has_data = config.data.mock_data or data_sources(config).flags
    return replace(
        config,
        # A converted model names neither data nor a learning rate.
        data=config.data if has_data else replace(config.data, mock_data=True),
        optimizer=OptimizerConfig(lr=1.0),
        parallel=ParallelConfig(
            tensor_model_parallel_size=placement.tensor_model_parallel_size,
            pipeline_model_parallel_size=placement.pipeline_model_parallel_size,
            # A single token cannot be cut.
            sequence_parallel=False,
        ),
        training=replace(
            config.training,
            micro_batch_size=placement.micro_batch_size,
            global_batch_size=None,
            rampup_batch_size=[],
            step_batch_size_schedule=None,
            eval_interval=None,
            device=placement.device,
        ),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
    )
