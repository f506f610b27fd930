"""Which implementation of each operator a run uses: what `--ops` says. Names only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

OPERATORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rms_norm", "layer_norm"), ("norm_forward", "norm_backward")),
    **dict.fromkeys(
        ("swiglu", "geglu", "gelu", "gelu_tanh", "relu", "squared_relu"), ("activation_forward", "activation_backward")
    ),
    "initial_values": ("initial_rows",),
    "adamw": ("adamw_",),
    "sum_of_squares": ("sum_of_squares",),
    "accumulate": ("accumulate_",),
    "cross_entropy": ("cross_entropy_statistics", "cross_entropy_backward_"),
    "rotary": ("rotary_",),
    "softmax": ("softmax_forward", "softmax_backward"),
    "dropout_add": ("dropout_add", "dropout_add_backward"),
    "add_rows": ("add_rows", "embedding_gradient_"),
    "embedding_gradient": ("embedding_gradient_",),
}
"""Each operator that can be chosen, with the compiled operators that it consists of."""

OTHERS: dict[str, frozenset[str]] = {
    "torch": frozenset({"adamw", "rms_norm", "layer_norm"}),
    "apex": frozenset({"rms_norm", "layer_norm"}),
}
"""Libraries that have fused versions of some operators, and of which."""

IMPLEMENTATIONS = ("auto", "native", "reference", *OTHERS)


@dataclass(frozen=True)
class OperatorChoices:
    """The implementation of all operators, and of those that are named.

    "auto" is the native one wherever it is built for the tensor's device and the reference in plain torch elsewhere,
    "native" makes its absence an error, and a library (OTHERS) counts for the operators that it has.
    """

    default: str = "auto"
    named: tuple[tuple[str, str], ...] = ()

    def of(self, operator: str) -> str:
        """The implementation to use for `operator`."""
        assert operator in OPERATORS, f"{operator} is not among {', '.join(OPERATORS)}"
        choice = dict(self.named).get(operator, self.default)
        return choice if operator in OTHERS.get(choice, OPERATORS) else "auto"


def parse_choices(words: Sequence[str]) -> OperatorChoices:
    """The choices that `words` make, each an implementation for all operators or OPERATOR=IMPLEMENTATION.

    Raises ValueError with a sentence for a word that is neither, and for one that says something a second time.
    """
    default: str | None = None
    named: dict[str, str] = {}
    for word in words:
        operator, equals, choice = word.rpartition("=")
        if choice not in IMPLEMENTATIONS:
            raise ValueError(f"{choice!r} is no implementation; use --ops {', '.join(IMPLEMENTATIONS)}")
        if not equals:
            if default is not None:
                raise ValueError(f"{default} and {choice} are given for all operators; use --ops {choice} alone")
            default = choice
            continue
        if operator not in OPERATORS:
            nearest = (get_close_matches(operator, OPERATORS, 1, cutoff=0.0) or list(OPERATORS))[0]
            known = ", ".join(OPERATORS)
            raise ValueError(f"{operator!r} is no operator; use --ops {nearest}={choice}, or another of {known}")
        if operator in named:
            raise ValueError(f"{operator} is given two implementations; use --ops {operator}={choice} alone")
        if operator not in OTHERS.get(choice, OPERATORS):
            raise ValueError(
                f"{choice} has no {operator}; use --ops {operator}=auto, or {choice} for {_listed(choice)}"
            )
        named[operator] = choice
    return OperatorChoices(default or "auto", tuple(named.items()))


def _listed(library: str) -> str:
    return ", ".join(sorted(OTHERS[library]))
