"""A configuration error with its way out, and what rules that find them are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megallm.config.tree import Config


@dataclass(frozen=True)
class Problem:
    """One configuration error: the flags it concerns, what is wrong with which figures, and what works instead."""

    flags: tuple[str, ...]
    wrong: str
    arithmetic: str  # empty where there is nothing to compute
    way_out: str

    def __str__(self) -> str:
        arithmetic = f" ({self.arithmetic})" if self.arithmetic else ""
        return f"{', '.join(self.flags)}: {self.wrong}{arithmetic}; {self.way_out}"


@dataclass(frozen=True)
class Rule:
    """Finds the problems of one kind in a configuration for a number of processes.

    It is asked only where each value that it `needs` (`section.name`) is present and possible by itself, so that a
    missing value is reported once and not by everything that follows from it.
    """

    name: str
    needs: tuple[str, ...]
    find: Callable[[Config, int], Iterator[Problem]]


def rule(*needs: str) -> Callable[[Callable[[Config, int], Iterator[Problem]]], Rule]:
    """Make a generator of problems into a rule that carries its name."""
    return lambda find: Rule(find.__name__, needs, find)


def multiples_near(value: int, divisor: int) -> str:
    """The positive multiples of `divisor` next to `value`, as "6 or 8"."""
    below = value // divisor * divisor
    return either([below, below + divisor] if below > 0 else [below + divisor])


def divisors_near(number: int, value: int) -> str:
    """The divisors of `number` next to `value`, which is none, as "2 or 4"."""
    below = max((n for n in range(1, min(value, number) + 1) if number % n == 0), default=None)
    above = min((n for n in range(value, number + 1) if number % n == 0), default=None)
    return either(sorted({n for n in (below, above) if n is not None}))


def either(options: Iterable[object]) -> str:
    """The options joined by "or"."""
    return " or ".join(map(str, options))
