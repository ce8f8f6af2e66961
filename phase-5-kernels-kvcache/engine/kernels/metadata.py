"""Where a token lies in a cache, for kernels: the same numbers for every kind of cache.

Keys of a layer are one tensor [places, kv_heads, slots, head_dim]. Position p of a row lies in

    static    place = row,              slot = p
    ring      place = row,              slot = p modulo slots
    paged     place = table[p / 16],    slot = p modulo 16
    dynamic   a tensor of every row's own, that holds nothing else

What changes from step to step (rows, lengths, page tables) is copied to the device once, for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from common.errors import UserError

from ..kv_cache import DynamicCache, KVCache, PagedCache, RingCache, StaticCache
from ..kv_cache.paged import PAGE
from ..kv_cache.ring import SPARE
from ..kv_cache.storage import Storage


class Layer(NamedTuple):
    """Keys and values of a layer, each [places, kv_heads, slots, head_dim]."""

    keys: Storage
    values: Storage

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """float16 [places, kv_heads, slots, 1] of an int8 cache."""
        return self.keys.scales, self.values.scales


@dataclass
class AttentionMetadata:
    """For the R rows of one forward; on the device: rows, starts, counts int32 [R], tables int32 [R, width]."""

    rows_asked: list[int]
    counts_asked: list[int]
    lengths: list[int]
    first: list[int]  # of every row the earliest position that is still there
    rows: Tensor
    starts: Tensor  # the position of the first new token
    counts: Tensor
    tables: Tensor | None  # pages
    wrap: int  # slots of a ring; 0: positions never wrap
    sights: dict[tuple[int, int], tuple[object, object]] = field(default_factory=dict)  # see key_ranges.py

    @property
    def ends(self) -> list[int]:
        return [length + count for length, count in zip(self.lengths, self.counts_asked, strict=True)]


_LAST: WeakKeyDictionary[KVCache, AttentionMetadata] = WeakKeyDictionary()  # of every cache, those of its last forward


def places_of(op: str, cache: KVCache, rows: list[int], counts: list[int], device: torch.device) -> AttentionMetadata:
    """Those of the last call if nothing has changed since, as from layer to layer. UserError names the op."""
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
    numbers = torch.tensor([rows, lengths, counts], dtype=torch.int32, device=device)
    first = [cache.first(row) for row in rows]
    made = AttentionMetadata(rows, counts, lengths, first, numbers[0], numbers[1], numbers[2], tables, wrap)
    _LAST[cache] = made
    return made


def in_row(device: torch.device) -> AttentionMetadata:
    """For a row that is alone in its tensor, as in a dynamic cache: place 0."""
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    return AttentionMetadata([0], [], [], [], zero, zero, zero, None, 0)


def layer_of(cache: KVCache, layer: int) -> Layer:
    """Of the caches that hold all rows in one tensor."""
    assert isinstance(cache, StaticCache | RingCache | PagedCache)
    return Layer(cache.keys[layer], cache.values[layer])


def row_of(cache: DynamicCache, layer: int, row: int) -> Layer:
    """A row's own tensors [kv_heads, n, head_dim] as those of a cache of one place."""

    def placed(storage: Storage) -> Storage:
        return storage._with(lambda tensor: tensor[None])

    return Layer(placed(cache.keys[layer][row]), placed(cache.values[layer][row]))
