"""Computing again in the backward pass what need not be kept from the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run(function: Callable[..., Any], *arguments: Any, again: bool) -> Any:
    """`function(*arguments)`. With `again` only its arguments are kept, and it is called once more for its gradient.

    Random numbers are a function of the step and the element, so that there is no generator state to preserve.
    """
    if again and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)
