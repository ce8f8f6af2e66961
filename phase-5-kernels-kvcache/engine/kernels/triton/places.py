"""Where a token lies in a cache, for the kernels: the same three numbers for every kind of cache.

Keys of a layer are one tensor [places, kv_heads, slots, head_dim]. Position p of a row lies in

    static, ring   place = row,              slot = p modulo slots (a static cache has a slot for every position)
    paged          place = table[p / 16],    slot = p modulo 16
    dynamic        a tensor of every row's own, that holds nothing else

What changes from step to step (rows, lengths, page tables) is copied to the device once, for all layers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kv_cache import DynamicCache, KVCache, PagedCache, RingCache, StaticCache
from ...kv_cache.ring import SPARE
from ...kv_cache.storage import Storage
from .support import require


@triton.jit
def offset(rows, tables, r, position, slots, table_width, s_place, s_slot, PAGED: tl.constexpr):
    """Of the first head's features of some positions of the forward's row r, in elements."""
    slot = position % slots
    if PAGED:
        place = tl.load(tables + r * table_width + position // slots).to(tl.int64)
    else:
        place = tl.load(rows + r).to(tl.int64)
    return place * s_place + slot * s_slot


class Layer(NamedTuple):
    """Keys and values of a layer, each [places, kv_heads, slots, head_dim], and what int8 is multiplied with."""

    keys: Storage
    values: Storage

    @property
    def int8(self) -> bool:
        return self.keys.scales is not None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """keys, values, and their scales; where there are none, something that is not read."""
        keys, values = self.keys.values, self.values.values
        if self.keys.scales is None or self.values.scales is None:
            return keys, values, keys, values
        return keys, values, self.keys.scales, self.values.scales


@dataclass
class Places:
    """For the R rows of one forward; on the device: rows, starts, counts int32 [R], tables int32 [R, width]."""

    rows_asked: list[int]
    counts_asked: list[int]
    lengths: list[int]
    first: list[int]  # of every row the earliest position that is still there
    rows: Tensor
    starts: Tensor  # the position of the first new token
    counts: Tensor
    tables: Tensor
    paged: bool
    slots: int
    sights: dict[int, tuple[object, object]] = field(default_factory=dict)  # see sight.py

    @property
    def ends(self) -> list[int]:
        return [length + count for length, count in zip(self.lengths, self.counts_asked, strict=True)]


_LAST: WeakKeyDictionary[KVCache, Places] = WeakKeyDictionary()  # of every cache, those of its last forward


def places_of(op: str, cache: KVCache, rows: list[int], counts: list[int], device: torch.device) -> Places:
    """Those of the last call if nothing has changed since, as from layer to layer."""
    lengths = [cache.length(row) for row in rows]
    last = _LAST.get(cache)
    if (
        last is not None
        and last.rows_asked is rows
        and last.counts_asked is counts
        and last.lengths == lengths
        and last.rows.device == device
    ):
        return last
    ends = [length + count for length, count in zip(lengths, counts, strict=True)]
    tables, paged, slots = [[0] for _ in rows], False, 1 << 30
    if isinstance(cache, PagedCache):
        paged, slots = True, cache.keys[0].values.shape[2]
        width = max([1, *(len(cache.tables[row]) for row in rows)])
        tables = [cache.tables[row] + [0] * (width - len(cache.tables[row])) for row in rows]
        room = [len(cache.tables[row]) * slots for row in rows]
    elif isinstance(cache, StaticCache):
        slots, room = cache.capacity, [cache.capacity] * len(rows)
    elif isinstance(cache, RingCache):
        slots, room = cache.slots, [length + SPARE for length in lengths]
    else:
        require(op, isinstance(cache, DynamicCache), f"a cache of the kind {type(cache).__name__}", "a KV cache")
        room = ends
    for row, end, most in zip(rows, ends, room, strict=True):
        require(op, end <= most, f"row {row} of the cache is to hold {end} tokens", f"at most {most}, see make_room")
    numbers = torch.tensor([rows, lengths, counts], dtype=torch.int32, device=device)
    table = torch.tensor(tables, dtype=torch.int32, device=device)
    first = [cache.first(row) for row in rows]
    made = Places(rows, counts, lengths, first, numbers[0], numbers[1], numbers[2], table, paged, slots)
    _LAST[cache] = made
    return made


def layer_of(cache: KVCache, layer: int) -> Layer:
    """Of the caches that hold all rows in one tensor."""
    assert isinstance(cache, StaticCache | RingCache | PagedCache)
    return Layer(cache.keys[layer], cache.values[layer])
