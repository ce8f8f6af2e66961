"""`--kv ring`: constant memory, for models that were trained with window attention over W tokens (Mistral).

The token at position p is stored in slot p modulo W + 16, so the cache holds the last W + 16 tokens. A step has
up to 16 tokens: none overwrites a token in the window of another, and rollback still only sets the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError

from .protocol import CacheShape
from .static import InPlaceCache

SPARE = 16  # most tokens of one step


class RingCache(InPlaceCache):
    """Per layer two tensors [rows, kv_heads, window + 16, head_dim]."""

    def __init__(
        self, shape: CacheShape, rows: int, window: int, dtype: torch.dtype, computed: torch.dtype, device: torch.device
    ) -> None:
        self.slots = window + SPARE
        super().__init__(shape, rows, (rows, shape.kv_heads, self.slots, shape.head_dim), dtype, computed, device)
        self.reached = [0] * rows  # one past the furthest position ever written: later writes overwrite older slots

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

    def place(self, row: int, positions: Tensor) -> tuple[int, slice, Tensor]:
        return row, slice(None), positions % self.slots

    def truncate(self, row: int, length: int) -> None:
        """Cut the row. ValueError if part of the next token's window is overwritten."""
        if 0 < length < self.shortest(row):
            raise ValueError(f"cannot truncate to {length}: what the window shows from there is overwritten")
        super().truncate(row, length)
        if length == 0:
            self.reached[row] = 0

    def fork(self, row: int, into: int) -> None:
        for storage in self.stores:
            storage.move(row, into)
        self.lengths[into], self.reached[into] = self.lengths[row], self.reached[row]
