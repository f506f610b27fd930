"""Initial values: the box of a tensor that a rank owns, each number a function of its place in the whole tensor.

On a CPU, wherever the tensor will live: a model starts with the same bits on every device.
"""

import torch
from torch import Tensor

from megallm import random
from megallm.ops.library import NATIVE, register_fakes

__all__ = ["normal_box", "uniform_box"]


def normal_box(
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    implementation: str = "auto",
) -> Tensor:
    """The box [offset, offset + shape) of a standard normal tensor of `global_shape`: float32, as
    `megallm.random.normal_box` makes it.

    Native and reference turn the same random integers into numbers in float64 and round them once: of the float32
    numbers about one in a million may differ in its last bit.
    """
    key = random.stream_key(seed, name)
    if NATIVE.serves("initial_values", key, implementation):
        return random.fill_box(_native_normal_rows, key, global_shape, offset, shape)
    return random.normal_box(seed, name, global_shape, offset, shape)


def uniform_box(
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    implementation: str = "auto",
) -> Tensor:
    """The same of a tensor that is uniform from -1 to 1, with the bits of `megallm.random.uniform_box`."""
    key = random.stream_key(seed, name)
    if NATIVE.serves("initial_values", key, implementation):
        return random.fill_box(_native_uniform_rows, key, global_shape, offset, shape)
    return random.uniform_box(seed, name, global_shape, offset, shape)


def _native_normal_rows(key: Tensor, rows: Tensor, start: int, num_columns: int) -> Tensor:
    return torch.ops.megallm.initial_rows(key, rows, start, num_columns, True)


def _native_uniform_rows(key: Tensor, rows: Tensor, start: int, num_columns: int) -> Tensor:
    return torch.ops.megallm.initial_rows(key, rows, start, num_columns, False)


def _fake_initial_rows(key: Tensor, rows: Tensor, start: int, num_columns: int, normal: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], num_columns, dtype=torch.float32)


register_fakes({"initial_rows": _fake_initial_rows})
