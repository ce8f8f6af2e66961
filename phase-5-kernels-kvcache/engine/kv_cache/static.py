"""`--kv static`: memory for the longest sequence, allocated once; `append` writes in place.

Rollback only sets the length: the next step overwrites the entries after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError

from .in_place import InPlaceCache
from .protocol import CacheShape


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
