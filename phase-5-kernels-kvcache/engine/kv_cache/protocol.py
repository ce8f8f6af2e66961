"""What a KV cache does, whichever way it keeps its memory.

A cache holds, for every layer, keys and values of the first `length(row)` tokens of each row. A forward appends those
of its tokens behind that length, layer by layer, and attention reads them from there; only `keep` makes them part of
the row. So a rejected draft costs nothing: what was not kept is overwritten.

    append(layer, ...)  for every layer       keys and values of m new tokens, behind the length
    read(layer, ...)                          those of the row, and of the m new ones
    keep(row, entries)                        of the new ones, these stand: they move together, the length grows
    truncate(row, length)                     the row ends earlier
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class CacheShape(NamedTuple):
    """What one token takes: its keys and its values, in every layer."""

    layers: int
    kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype_bytes: int, scale_bytes: int = 0) -> int:
        return 2 * self.layers * self.kv_heads * (self.head_dim * dtype_bytes + scale_bytes)


class KVCache(Protocol):
    """Rows are numbered from 0. All tensors of keys and values are [tokens, kv_heads, head_dim]."""

    shape: CacheShape

    def length(self, row: int) -> int:
        """Tokens that the row holds."""
        ...

    def first(self, row: int) -> int:
        """The earliest of them that can still be read: 0, except where old ones are overwritten."""
        ...

    def shortest(self, row: int) -> int:
        """Fewer tokens than this a row cannot be cut back to, except none: what they look back on is overwritten."""
        ...

    def make_room(self, row: int, tokens: int) -> None:
        """Before a forward over this many new tokens. UserError where the cache cannot hold them; nothing changed."""
        ...

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Write behind the row's length; the length stays."""
        ...

    def read(self, layer: int, row: int, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, n, head_dim] of the tokens from `first` on, `new` appended ones included."""
        ...

    def keep(self, row: int, entries: list[int]) -> None:
        """Of the tokens appended behind the length, those numbered (ascending) stand, one behind the other."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget what lies behind the first `length` tokens. ValueError for more than there are, or too few."""
        ...

    def fork(self, row: int, into: int) -> None:
        """Make `into` hold what `row` holds; each goes its own way from then on."""
        ...

    def nbytes(self) -> int:
        """Memory that is taken now."""
        ...
