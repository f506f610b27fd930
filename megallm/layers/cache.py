"""Keys and values of the tokens so far, so that one more token costs one token's work."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch


class KeyValueCache:
    """What attention layers keep of several texts while they grow, each up to `capacity` tokens.

    All layers are given the same new tokens, the same number of each text, of which the last ones may be padding; then
    `advance` says how many of each are kept. Attribute `lengths`: tokens that are kept, int64 [batch].
    """

    def __init__(self, capacity: int, batch_size: int, device: torch.device) -> None:
        self.capacity = capacity
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._longest = 0
        self._kept: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}

    def positions(self, num_new: int) -> torch.Tensor:
        """Where in its text each of so many new tokens would stand: int64 [batch, new]."""
        return self.lengths.unsqueeze(1) + torch.arange(num_new, device=self.lengths.device)

    def end_with(self, num_new: int) -> int:
        """Tokens of the longest text with so many new ones."""
        return min(self._longest + num_new, self.capacity)

    def extend(self, layer: Hashable, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the new tokens' keys and values [batch, groups, new, head_dim] behind those of `layer`.

        Returns those of all tokens so far: two tensors [batch, groups, end_with(new), head_dim]. Behind the end of a
        shorter text stands what is finite and means nothing.
        """
        num_new = key.shape[2]
        if layer not in self._kept:
            # One place more, for padding that would stand behind the capacity. A weight of zero does not undo a NaN.
            shape = (*key.shape[:2], self.capacity + 1, key.shape[3])
            self._kept[layer] = key.new_zeros(shape), value.new_zeros(shape)
        places = self.positions(num_new).clamp(max=self.capacity)
        places = places[:, None, :, None].expand_as(key)  # [batch, new] -> [batch, groups, new, head_dim]
        for kept, new in zip(self._kept[layer], (key, value), strict=True):
            kept.scatter_(2, places, new)
        keys, values = self._kept[layer]
        end = self.end_with(num_new)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, counts: Sequence[int]) -> None:
        """All layers have put so many tokens behind theirs, of each text."""
        self.lengths += torch.tensor(counts, device=self.lengths.device)
        self._longest = int(self.lengths.max())
        assert self._longest <= self.capacity, f"the cache has room for {self.capacity} tokens, not {self._longest}"
