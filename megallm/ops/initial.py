"""Initial values: the box of a tensor that a rank owns, each number a function of its place in the whole tensor.

The native operator makes the same bits on every device. Where a device does not have it, they are made on the CPU.
"""

import torch
from torch import Tensor

from megallm import random
from megallm.ops.library import NATIVE, register_fakes

__all__ = ["normal_box", "uniform_box"]

CPU = torch.device("cpu")


def normal_box(
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    device: torch.device = CPU,
    implementation: str = "auto",
) -> Tensor:
    """The box [offset, offset + shape) of a standard normal tensor of `global_shape`: float32 on `device`, as
    `megallm.random.normal_box` makes it.

    Native and reference turn the same random integers into numbers in float64 and round them once: of the float32
    numbers about one in a million may differ in its last bit.
    """
    made = _native_box(seed, name, global_shape, offset, shape, device, implementation, normal=True)
    return made if made is not None else random.normal_box(seed, name, global_shape, offset, shape).to(device)


def uniform_box(
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    device: torch.device = CPU,
    implementation: str = "auto",
) -> Tensor:
    """The same of a tensor that is uniform from -1 to 1, with the bits of `megallm.random.uniform_box`."""
    made = _native_box(seed, name, global_shape, offset, shape, device, implementation, normal=False)
    return made if made is not None else random.uniform_box(seed, name, global_shape, offset, shape).to(device)


def _native_box(
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    device: torch.device,
    implementation: str,
    *,
    normal: bool,
) -> Tensor | None:
    """The box from the operator of `device`, else from the CPU's; None where neither is to run."""
    rows = random.rows_of_box(global_shape, offset, shape)
    for place in dict.fromkeys((device, CPU)):
        key = random.stream_key(seed, name, place)
        if NATIVE.serves("initial_values", key, implementation):
            made = torch.ops.megallm.initial_rows(key, rows.to(place), offset[-1], shape[-1], normal)
            return made.view(shape).to(device)
    return None


def _fake_initial_rows(key: Tensor, rows: Tensor, start: int, num_columns: int, normal: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], num_columns, dtype=torch.float32)


register_fakes({"initial_rows": _fake_initial_rows})
