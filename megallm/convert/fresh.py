"""Tensors that a model comes without, such as the heads of an encoder that was saved alone: they begin anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megallm.config.tree import Config
from megallm.convert.model import descriptions
from megallm.convert.stored import LogicalTensors
from megallm.parameter import initialize, make_parameter, piece_views


class WithFresh:
    """`LogicalTensors` of which those named `fresh` have the initial values of a run with the default seed."""

    def __init__(self, read: LogicalTensors, config: Config, fresh: Iterable[str]) -> None:
        self._read, self._seed = read, config.training.seed
        names = set(fresh)
        self._fresh = {
            piece.name: described
            for described in descriptions(config)
            for piece in described.pieces
            if piece.name in names
        }
        assert self._fresh.keys() == names, f"tensors of no model: {names - self._fresh.keys()}"
        common = next(iter(read.dtypes.values()))
        self.dtypes = {**read.dtypes, **dict.fromkeys(self._fresh, common)}

    def fill(self, name: str, offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """As `LogicalTensors.fill`."""
        if name not in self._fresh:
            self._read.fill(name, offset, tensor)
            return
        described = self._fresh[name]
        parameter = make_parameter(described, torch.float32, torch.device("cpu"))
        initialize(parameter, self._seed)
        whole = next(view for piece, view in piece_views(parameter, described) if piece.name == name)
        tensor.copy_(whole[tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))])
