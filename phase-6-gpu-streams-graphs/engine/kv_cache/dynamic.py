"""`--kv dynamic`: every append allocates new tensors, one token longer. The simplest cache, kept as a contrast.

A sequence of n tokens copies 1 + 2 + ... + n tokens in total.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import CacheShape, KVCache
from .storage import Storage


class DynamicCache(KVCache):
    """Per layer and row two tensors [kv_heads, n, head_dim]."""

    def __init__(
        self, shape: CacheShape, rows: int, dtype: torch.dtype, computed: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, rows, device)
        self.format, self.computed = dtype, computed
        self.keys = [[self._empty() for _ in range(rows)] for _ in range(shape.layers)]
        self.values = [[self._empty() for _ in range(rows)] for _ in range(shape.layers)]

    def _empty(self, tokens: int = 0) -> Storage:
        size = (self.shape.kv_heads, tokens, self.shape.head_dim)
        return Storage(size, self.format, self.computed, self.device)

    def make_room(self, row: int, tokens: int) -> None:
        """Do nothing: a row grows at every append."""

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        for of_layer, x in ((self.keys[layer], keys), (self.values[layer], values)):
            added = self._empty(len(x))
            added.write((), x.transpose(0, 1))
            of_layer[row] = of_layer[row].first(self.lengths[row]).joined(added)

    def read(self, layer: int, row: int, new: int) -> tuple[Tensor, Tensor]:
        place = (slice(None), slice(0, self.lengths[row] + new))
        return self.keys[layer][row].read(place), self.values[layer][row].read(place)

    def keep(self, row: int, entries: list[int]) -> None:
        start = self.lengths[row]
        self.lengths[row] += len(entries)
        if entries == list(range(len(entries))):
            self.truncate(row, self.lengths[row])
            return
        kept = [*range(start), *(start + entry for entry in entries)]
        for of_layer in (*self.keys, *self.values):
            of_layer[row] = of_layer[row].chosen(kept)

    def truncate(self, row: int, length: int) -> None:
        super().truncate(row, length)
        for of_layer in (*self.keys, *self.values):
            of_layer[row] = of_layer[row].first(length)

    def fork(self, row: int, into: int) -> None:
        for of_layer in (*self.keys, *self.values):
            of_layer[into] = of_layer[row].first(self.lengths[row])
        self.lengths[into] = self.lengths[row]

    def nbytes(self) -> int:
        return sum(storage.nbytes for of_layer in (*self.keys, *self.values) for storage in of_layer)
