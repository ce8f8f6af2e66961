"""`--kv static`: memory for the longest sequence, allocated once; `append` writes in place.

Rollback only sets the length: the next step overwrites the entries after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError

from .protocol import CacheShape
from .storage import Storage


class StaticCache:
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
        self.shape, self.capacity = shape, capacity
        size = (rows, shape.kv_heads, capacity, shape.head_dim)
        self.keys = [Storage(size, dtype, computed, device) for _ in range(shape.layers)]
        self.values = [Storage(size, dtype, computed, device) for _ in range(shape.layers)]
        self.lengths = [0] * rows

    def length(self, row: int) -> int:
        return self.lengths[row]

    def first(self, row: int) -> int:
        return 0

    def shortest(self, row: int) -> int:
        return 0

    def make_room(self, row: int, tokens: int) -> None:
        if self.lengths[row] + tokens > self.capacity:
            raise UserError(
                f"the KV cache holds {self.capacity} tokens per text, and {self.lengths[row] + tokens} are needed: "
                "give a larger --kv-slots, or 0 for as many as the request can need"
            )

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        start = self.lengths[row]
        place = (row, slice(None), slice(start, start + len(keys)))
        self.keys[layer].write(place, keys.transpose(0, 1))
        self.values[layer].write(place, values.transpose(0, 1))

    def read(self, layer: int, row: int, new: int) -> tuple[Tensor, Tensor]:
        place = (row, slice(None), slice(0, self.lengths[row] + new))
        return self.keys[layer].read(place), self.values[layer].read(place)

    def keep(self, row: int, entries: list[int]) -> None:
        start = self.lengths[row]
        moved = [(start + entry, start + at) for at, entry in enumerate(entries) if entry != at]
        if moved:
            pairs = torch.tensor(moved, device=self.keys[0].values.device)
            for storage in (*self.keys, *self.values):
                storage.move((row, slice(None), pairs[:, 0]), (row, slice(None), pairs[:, 1]))
        self.lengths[row] += len(entries)

    def truncate(self, row: int, length: int) -> None:
        check_truncation(length, self.lengths[row])
        self.lengths[row] = length

    def fork(self, row: int, into: int) -> None:
        place = slice(0, self.lengths[row])
        for storage in (*self.keys, *self.values):
            storage.move((row, slice(None), place), (into, slice(None), place))
        self.lengths[into] = self.lengths[row]

    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in (*self.keys, *self.values))


def check_truncation(length: int, held: int) -> None:
    """Raise ValueError if a row of `held` tokens cannot be cut to `length`."""
    if not 0 <= length <= held:
        raise ValueError(f"cannot truncate a row of {held} tokens to {length}")
