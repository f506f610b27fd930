"""Keys and values of the tokens so far, so that one more token costs one token's work."""

from __future__ import annotations

from collections.abc import Hashable

import torch


class KeyValueCache:
    """What attention layers keep of a sequence while it grows, up to `capacity` tokens.

    All layers of a stage see the same new tokens, and then `advance` says that they are kept. Attribute `length`:
    tokens that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(self, layer: Hashable, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the new tokens' keys and values [batch, groups, new, head_dim] behind those of `layer`.

        Returns those of all tokens so far: two tensors [batch, groups, length + new, head_dim].
        """
        end = self.length + key.shape[2]
        assert end <= self.capacity, f"the cache has room for {self.capacity} tokens, not for {end}"
        if layer not in self._kept:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self._kept[layer] = key.new_empty(shape), value.new_empty(shape)
        keys, values = self._kept[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = key, value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, num_tokens: int) -> None:
        """All layers have put so many tokens behind theirs."""
        self.length += num_tokens
