"""`--kv static`: memory for the longest sequence, allocated once; `append` writes in place.

Rollback only sets the length: the next step overwrites the entries after it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

from .protocol import CacheShape, KVCache
from .storage import Storage


class InPlaceCache(KVCache):
    """The common part of static, ring and paged: per layer two tensors, allocated once.

    Each kind says where in them the token at a position is.
    """

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


class StaticCache(InPlaceCache):
    """Per layer two tensors [rows, kv_heads, capacity, head_dim]."""

    def __init__(
        self,
        shape: CacheShape,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        computed: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(shape, rows, (rows, shape.kv_heads, capacity, shape.head_dim), dtype, computed, device)
        self.capacity = capacity

    def make_room(self, row: int, tokens: int) -> None:
        if self.lengths[row] + tokens > self.capacity:
            raise UserError(
                f"the KV cache holds {self.capacity} tokens per text, and {self.lengths[row] + tokens} are needed: "
                "give a larger --kv-slots, or 0 for as many as the request can need"
            )

    def place(self, row: int, positions: Tensor) -> tuple[int, slice, Tensor]:
        return row, slice(None), positions

    def places(self, row: int, start: int, stop: int) -> tuple[int, slice, slice]:
        return row, slice(None), slice(start, stop)

    def fork(self, row: int, into: int) -> None:
        for storage in self.stores:
            storage.move(self.places(row, 0, self.lengths[row]), self.places(into, 0, self.lengths[row]))
        self.lengths[into] = self.lengths[row]
