"""What a launcher says in the environment, looked at before anything believes it."""

from __future__ import annotations

from collections.abc import Mapping

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def launcher_problem(environment: Mapping[str, str]) -> str | None:
    """A sentence on the first thing that is wrong with the variables that torchrun sets, or None."""
    numbers: dict[str, int] = {}
    for name in _NUMBERS:
        value = environment.get(name)
        if value is None:
            continue
        if not (value.isascii() and value.isdigit()):
            return f"the environment variable {name} is {value!r}, no whole number: unset it, or start with torchrun"
        numbers[name] = int(value)
    for size, rank in (("WORLD_SIZE", "RANK"), ("LOCAL_WORLD_SIZE", "LOCAL_RANK")):
        if numbers.get(size, 1) < 1:
            return f"the environment variable {size} is 0, but a job has at least 1 process: start with torchrun"
        if size in numbers and numbers.get(rank, 0) >= numbers[size]:
            return (
                f"the environment variable {rank} is {numbers[rank]}, but ranks count from 0 to {size} - 1 = "
                f"{numbers[size] - 1}: start with torchrun, which sets both"
            )
    return None
