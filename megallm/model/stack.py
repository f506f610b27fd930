"""The layers of one pipeline stage, and which of them are computed again in the backward pass."""

from __future__ import annotations

import torch
from torch import nn

from megallm.config.tree import ModelConfig, TrainingConfig
from megallm.layers import recompute
from megallm.layers.context import LayoutContext, SequenceContext
from megallm.model.block import TransformerLayer, added


class LayerStack(nn.ModuleList):
    """Layers `numbers` of a transformer, one after another: [sequence (/ tp), batch, hidden] -> the same shape.

    Within a run of layers each leaves its last addition to the first norm of the next; what a run returns, and what is
    kept of it where it is computed again, is one tensor.
    """

    def __init__(
        self, name: str, numbers: range, model: ModelConfig, training: TrainingConfig, context: LayoutContext
    ) -> None:
        modules = training.recompute_modules if training.recompute_granularity == "selective" else []
        super().__init__(TransformerLayer(f"{name}.{number}", model, context, modules) for number in numbers)
        self.runs = runs_of_layers(len(numbers), training)

    def forward(self, hidden: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
        for layers, again in self.runs:
            hidden = recompute.run(self._run, layers, hidden, sequence, again=again)
        return hidden

    def _run(self, layers: range, hidden: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
        branch = None
        for number in layers:
            hidden, branch = self[number](hidden, branch, sequence)
        return added(hidden, branch)


def runs_of_layers(num_layers: int, training: TrainingConfig) -> list[tuple[range, bool]]:
    """The layers of a stage as runs, each with whether it is computed again, from the input of its first layer."""
    if training.recompute_granularity != "full":
        return [(range(num_layers), False)]
    length = training.recompute_num_layers
    if training.recompute_method == "block":
        again = min(length, num_layers)
        return [(range(layer, layer + 1), True) for layer in range(again)] + [(range(again, num_layers), False)]
    return [(range(begin, min(begin + length, num_layers)), True) for begin in range(0, num_layers, length)]
