"""The interface of a KV cache.

For every layer, a cache holds keys and values of the first `length(row)` tokens of each row. A forward pass appends its
tokens after that length, layer by layer, and attention reads them there. Only `keep` adds them to the row. Rejecting a
draft therefore costs nothing: the next step overwrites its entries.

    append(layer, ...)  for every layer       writes keys and values of m new tokens after the length
    read(layer, ...)                          returns those of the row and of the m new tokens
    keep(row, entries)                        accepts some of the m: moves them to the front, and the length grows
    truncate(row, length)                     shortens the row
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class CacheShape(NamedTuple):
    """The size of one token's keys and values, over all layers."""

    layers: int
    kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype_bytes: int, scale_bytes: int = 0) -> int:
        return 2 * self.layers * self.kv_heads * (self.head_dim * dtype_bytes + scale_bytes)


class KVCache(ABC):
    """Rows are numbered from 0. All tensors of keys and values are [tokens, kv_heads, head_dim]."""

    def __init__(self, shape: CacheShape, rows: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.lengths = [0] * rows

    def length(self, row: int) -> int:
        """Return the number of tokens that the row holds."""
        return self.lengths[row]

    def first(self, row: int) -> int:
        """Return the earliest readable position: 0, unless old tokens were overwritten."""
        return 0

    def shortest(self, row: int) -> int:
        """Return the smallest length other than 0 that `truncate` allows: shorter rows lack part of their window."""
        return 0

    @abstractmethod
    def make_room(self, row: int, tokens: int) -> None:
        """Prepare for `tokens` new tokens. UserError if the cache cannot hold them; then nothing changed."""

    @abstractmethod
    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Write after the row's length; the length does not change."""

    @abstractmethod
    def read(self, layer: int, row: int, new: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [kv_heads, n, head_dim] from position `first` on, `new` appended tokens included."""

    @abstractmethod
    def keep(self, row: int, entries: list[int]) -> None:
        """Accept the appended tokens with these numbers (ascending): move them to the front, and extend the row."""

    def truncate(self, row: int, length: int) -> None:
        """Cut the row to its first `length` tokens. ValueError for more than it holds, or fewer than `shortest`."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"cannot truncate a row of {self.lengths[row]} tokens to {length}")
        self.lengths[row] = length

    @abstractmethod
    def fork(self, row: int, into: int) -> None:
        """Copy the content of `row` to the row `into`; later writes to one do not change the other."""

    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes that are allocated now."""
