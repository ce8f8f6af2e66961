"""Where a cache stores each token, for kernels: the same numbers for every kind of cache.

The keys of a layer are one tensor [pages, kv_heads, slots, head_dim]. Position p of a row is stored at

    static    page = row,              slot = p
    ring      page = row,              slot = p modulo slots
    paged     page = table[p / 16],    slot = p modulo 16
    dynamic   every row has a tensor of its own, of one page

What changes from step to step (rows, lengths, page tables) is copied to the device once, for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from common.errors import UserError

from ..kv_cache import DynamicCache, KVCache, PagedCache, RingCache, StaticCache
from ..kv_cache.paged import PAGE
from ..kv_cache.ring import SPARE
from ..kv_cache.storage import Storage

if TYPE_CHECKING:
    from .key_ranges import KeyRanges


class Layer(NamedTuple):
    """Keys and values of a layer, each [pages, kv_heads, slots, head_dim]."""

    keys: Storage
    values: Storage

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the scales of an int8 cache, bfloat16 [pages, kv_heads, slots, 1] each."""
        return self.keys.scales, self.values.scales


@dataclass
class AttentionMetadata:
    """Of the R rows of one forward. On the device: rows, starts, counts int32 [R], tables int32 [R, width]."""

    row_list: list[int]
    count_list: list[int]
    lengths: list[int]
    first: list[int]  # the earliest position that each row still holds
    rows: Tensor
    starts: Tensor  # the position of the first new token
    counts: Tensor
    tables: Tensor | None  # page tables
    wrap: int  # slots of a ring; 0: positions never wrap
    ranges: dict[tuple[int, int], tuple[object, KeyRanges]] = field(default_factory=dict)  # see key_ranges.py

    @property
    def ends(self) -> list[int]:
        """Return the length of each row with its new tokens."""
        return [length + count for length, count in zip(self.lengths, self.count_list, strict=True)]


_LAST: WeakKeyDictionary[KVCache, AttentionMetadata] = WeakKeyDictionary()  # the metadata of each cache's last forward


def metadata_of(op: str, cache: KVCache, rows: list[int], counts: list[int], device: torch.device) -> AttentionMetadata:
    """Return the metadata of appending counts[r] tokens to row rows[r]; UserError, naming the op, if there is no room.

    The metadata of the last call is returned again if nothing has changed since, as from layer to layer.
    """
    lengths, last = [cache.length(row) for row in rows], _LAST.get(cache)
    same_lists = last is not None and last.row_list is rows and last.count_list is counts
    if last is not None and same_lists and last.lengths == lengths and last.rows.device == device:
        return last
    tables, wrap = None, 0
    if isinstance(cache, PagedCache):
        width = max([1, *(len(cache.tables[row]) for row in rows)])
        padded = [cache.tables[row] + [0] * (width - len(cache.tables[row])) for row in rows]
        tables = torch.tensor(padded, dtype=torch.int32, device=device).view(len(rows), width)
        room = [len(cache.tables[row]) * PAGE for row in rows]
    elif isinstance(cache, StaticCache):
        room = [cache.capacity] * len(rows)
    elif isinstance(cache, RingCache):
        wrap, room = cache.slots, [length + SPARE for length in lengths]
    elif isinstance(cache, DynamicCache):
        room = [length + count for length, count in zip(lengths, counts, strict=True)]
    else:
        raise UserError(f"{op}: a cache of the kind {type(cache).__name__}; expected one of kv_cache/")
    for row, length, count, most in zip(rows, lengths, counts, room, strict=True):
        if length + count > most:
            raise UserError(f"{op}: row {row} of the cache is to hold {length + count} tokens; it has room for {most}")
    n = torch.tensor([rows, lengths, counts], dtype=torch.int32, device=device)
    first = [cache.first(row) for row in rows]
    made = _LAST[cache] = AttentionMetadata(rows, counts, lengths, first, n[0], n[1], n[2], tables, wrap)
    return made


def layer_of(cache: KVCache, layer: int) -> Layer:
    """Return a layer of a cache that keeps all rows in one tensor."""
    assert isinstance(cache, StaticCache | RingCache | PagedCache)
    return Layer(cache.keys[layer], cache.values[layer])


def row_of(cache: DynamicCache, layer: int, row: int) -> tuple[Layer, AttentionMetadata]:
    """Return a row's own tensors [kv_heads, n, head_dim] as a layer of one page, and the metadata of its one row."""
    keys, values = (each[layer][row]._with(lambda tensor: tensor[None]) for each in (cache.keys, cache.values))
    zero = torch.zeros(1, dtype=torch.int32, device=keys.values.device)
    return Layer(keys, values), AttentionMetadata([0], [], [], [], zero, zero, zero, None, 0)
