"""Operators of the transformer: one function each, native where compiled and plain torch everywhere."""

from megallm.ops.activation import geglu, gelu, gelu_tanh, relu, squared_relu, swiglu
from megallm.ops.dropout import Dropout, dropout_add
from megallm.ops.norm import layer_norm, norm_of_sum, rms_norm
from megallm.ops.rotary import apply_rotary, split_and_rotate
from megallm.ops.softmax import scaled_masked_softmax

__all__ = [
    "Dropout",
    "apply_rotary",
    "dropout_add",
    "geglu",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "norm_of_sum",
    "relu",
    "rms_norm",
    "scaled_masked_softmax",
    "split_and_rotate",
    "squared_relu",
    "swiglu",
]
