"""The common part of the caches that append in place, to memory allocated once: `static`, `ring` and `paged`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .protocol import CacheShape, KVCache
from .storage import Storage


class InPlaceCache(KVCache):
    """Per layer two tensors of one size. Each kind says where in them the token at a position is."""

    def __init__(
        self,
        shape: CacheShape,
        rows: int,
        size: tuple[int, ...],
        dtype: torch.dtype,
        computed: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(shape, rows, device)
        self.keys, self.values = (
            [Storage(size, dtype, computed, device) for _ in range(shape.layers)] for _ in ("keys", "values")
        )
        self.stores = [*self.keys, *self.values]

    @abstractmethod
    def place(self, row: int, positions: Tensor) -> Any:
        """Return the index of the row's tokens at these positions, int64 [n]."""

    def places(self, row: int, start: int, stop: int) -> Any:
        """Return the index of the row's tokens at positions start .. stop - 1."""
        return self.place(row, torch.arange(start, stop, device=self.device))

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        place = self.places(row, self.lengths[row], self.lengths[row] + len(keys))
        self.keys[layer].write(place, keys.transpose(0, 1))
        self.values[layer].write(place, values.transpose(0, 1))

    def read(self, layer: int, row: int, new: int) -> tuple[Tensor, Tensor]:
        place = self.places(row, self.first(row), self.lengths[row] + new)
        return self.keys[layer].read(place), self.values[layer].read(place)

    def keep(self, row: int, entries: list[int]) -> None:
        start = self.lengths[row]
        moved = [(start + entry, start + at) for at, entry in enumerate(entries) if entry != at]
        if moved:
            pairs = torch.tensor(moved, device=self.device)
            for storage in self.stores:
                storage.move(self.place(row, pairs[:, 0]), self.place(row, pairs[:, 1]))
        self.lengths[row] += len(entries)

    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in self.stores)
