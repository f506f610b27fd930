import torch
from torch import Tensor

from megallm.ops.adamw import adamw
from tests.unit.ops.accuracy import Case, Inputs

INPUTS = ("weights", "gradient", "first_moment", "second_moment", "rounded")


def make(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    """Of `rounded`, which is only written, nothing counts but its place."""
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in INPUTS}
    return made | {"second_moment": made["second_moment"].square()}


def flat_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What the operator may overwrite, as far from a multiple of 16 bytes as the tensor is, in elements."""
    # A compiler cannot tell.
    offset = 0 if torch.compiler.is_compiling() else tensor.storage_offset() % 8
    flat = tensor.new_empty(tensor.numel() + offset, dtype=dtype)[offset:]
    return flat.copy_(tensor.reshape(-1))


def update(inputs: Inputs, implementation: str, rounded_dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Two steps, of which the first is skipped."""
    copies = [flat_copy(inputs[name], inputs[name].dtype) for name in INPUTS[:-1]]
    device = copies[0].device
    num_updates = torch.full((), 3.0, device=device)
    # float64 weights, which stand for the exact result, are rounded to float64.
    rounded = None
    if rounded_dtype is not None and copies[0].dtype == torch.float32:
        rounded = flat_copy(inputs["rounded"], rounded_dtype)
    for skip in (1.0, 0.0):
        adamw(
            copies[0],
            flat_copy(inputs["gradient"], copies[1].dtype),
            copies[2],
            copies[3],
            num_updates,
            rounded,
            learning_rate=torch.full((), 2.0**-6, dtype=torch.float64, device=device),
            weight_decay=torch.full((), 0.1, dtype=torch.float64, device=device),
            gradient_scale=torch.full((), 0.3, dtype=torch.float64, device=device),
            skip=torch.full((), skip, dtype=torch.float64, device=device),
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            implementation=implementation,
        )
    # Not while a graph is compiled or recorded, which may ask for no values.
    if device.type == "cpu" and not torch.compiler.is_compiling():
        assert float(num_updates) == 4.0
        if rounded is not None:
            wanted = copies[0].to(rounded.dtype)
            torch.testing.assert_close(rounded, wanted, rtol=0, atol=0, equal_nan=True)
    shape = inputs["weights"].shape
    return tuple(copy.view(shape) for copy in (copies[0], copies[2], copies[3]))


def case(name: str, dtypes: tuple[torch.dtype, ...], rounded_dtype: torch.dtype | None) -> Case:
    return Case(
        name,
        "adamw",
        make,
        lambda inputs, implementation: update(inputs, implementation, rounded_dtype),
        fixed=frozenset(INPUTS),
        dtypes=dtypes,
    )


CASES = [
    case("adamw", (torch.float32, torch.float64), None),
    case("adamw with bfloat16 weights", (torch.float32,), torch.bfloat16),
    case("adamw with float16 weights", (torch.float32,), torch.float16),
]
