"""The stages of whichever kind of model a configuration describes."""

from __future__ import annotations

from megallm.config.tree import Config
from megallm.layers.context import LayoutContext
from megallm.model.bert import BERTStage
from megallm.model.gpt import GPTStage
from megallm.model.stage import TransformerStage

_STAGES = {"gpt": GPTStage, "bert": BERTStage}


def build_stage(
    config: Config, layers: range, context: LayoutContext, *, is_first: bool, is_last: bool
) -> TransformerStage:
    """A stage with the given layers, not initialised."""
    return _STAGES[config.model.architecture](config, layers, context, is_first=is_first, is_last=is_last)
