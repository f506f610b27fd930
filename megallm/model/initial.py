"""How the parameters of a model start, as a configuration asks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megallm.config.tree import ModelConfig
from megallm.parameter import InitialMethod, normal, xavier_uniform


@dataclass(frozen=True)
class InitialMethods:
    """The methods for three kinds of matrices.

    Attributes:
        embedding: tables of words, positions and the like.
        inner: matrices that read the residual stream, the output layer among them.
        output: matrices that add to the residual stream.
    """

    embedding: InitialMethod
    inner: InitialMethod
    output: InitialMethod


def initial_methods(model: ModelConfig) -> InitialMethods:
    """The methods of `model`."""
    # Each layer adds two outputs to the residual stream: their variance is kept down to that of one (GPT-2).
    inner, output = normal(model.init_method_std), normal(model.init_method_std / math.sqrt(2.0 * model.num_layers))
    if model.init_method_xavier_uniform:
        inner = output = xavier_uniform
    embedding = inner if model.embedding_init_method_std is None else normal(model.embedding_init_method_std)
    return InitialMethods(embedding, inner, output)
