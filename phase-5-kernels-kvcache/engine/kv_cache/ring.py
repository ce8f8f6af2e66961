"""`--kv ring`: constant memory, for models that were trained with window attention over W tokens (Mistral).

The token at position p is stored in slot p modulo W + 16, so the cache holds the last W + 16 tokens. A step has
up to 16 tokens: none overwrites a token in the window of another, and rollback still only sets the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError

from .protocol import CacheShape
from .static import check_truncation
from .storage import Storage

SPARE = 16  # most tokens of one step


class RingCache:
    """Per layer two tensors [rows, kv_heads, window + 16, head_dim]."""

    def __init__(
        self,
        shape: CacheShape,
        rows: int,
        window: int,
        dtype: torch.dtype,
        computed: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.slots = shape, window + SPARE
        size = (rows, shape.kv_heads, self.slots, shape.head_dim)
        self.keys = [Storage(size, dtype, computed, device) for _ in range(shape.layers)]
        self.values = [Storage(size, dtype, computed, device) for _ in range(shape.layers)]
        self.lengths = [0] * rows
        self.reached = [0] * rows  # one past the furthest position ever written: later writes overwrite older slots
        self.device = device

    def length(self, row: int) -> int:
        return self.lengths[row]

    def first(self, row: int) -> int:
        return max(0, self.reached[row] - self.slots)

    def shortest(self, row: int) -> int:
        """Return the shortest length whose next token still has its whole window."""
        first = self.first(row)
        return first + (self.slots - SPARE) - 1 if first else 0

    def make_room(self, row: int, tokens: int) -> None:
        if tokens > SPARE:
            raise UserError(f"a ring takes {SPARE} tokens at a time, and {tokens} came; prefill in chunks of {SPARE}")
        self.reached[row] = max(self.reached[row], self.lengths[row] + tokens)

    def _slots(self, row: int, start: int, stop: int) -> tuple[int, slice, Tensor]:
        return row, slice(None), torch.arange(start, stop, device=self.device) % self.slots

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        place = self._slots(row, self.lengths[row], self.lengths[row] + len(keys))
        self.keys[layer].write(place, keys.transpose(0, 1))
        self.values[layer].write(place, values.transpose(0, 1))

    def read(self, layer: int, row: int, new: int) -> tuple[Tensor, Tensor]:
        place = self._slots(row, self.first(row), self.lengths[row] + new)
        return self.keys[layer].read(place), self.values[layer].read(place)

    def keep(self, row: int, entries: list[int]) -> None:
        start = self.lengths[row]
        moved = [(start + entry, start + at) for at, entry in enumerate(entries) if entry != at]
        if moved:
            pairs = torch.tensor(moved, device=self.device) % self.slots
            for storage in (*self.keys, *self.values):
                storage.move((row, slice(None), pairs[:, 0]), (row, slice(None), pairs[:, 1]))
        self.lengths[row] += len(entries)

    def truncate(self, row: int, length: int) -> None:
        """Cut the row. ValueError if part of the next token's window is overwritten."""
        check_truncation(length, self.lengths[row])
        if length and length < self.shortest(row):
            raise ValueError(f"cannot truncate to {length}: what the window shows from there is overwritten")
        self.lengths[row] = length
        if length == 0:
            self.reached[row] = 0

    def fork(self, row: int, into: int) -> None:
        for storage in (*self.keys, *self.values):
            storage.move(row, into)
        self.lengths[into], self.reached[into] = self.lengths[row], self.reached[row]

    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in (*self.keys, *self.values))
