"""Where a cache stores each token, and what each query sees: made once for a forward, used by all its layers.

The keys of a layer are one tensor [pages, kv_heads, slots, head_dim]. Position p of a row is stored at

    static    page = row,              slot = p
    ring      page = row,              slot = p modulo slots
    paged     page = table[p / 16],    slot = p modulo 16
    dynamic   every row has a tensor of its own, of one page

Kernels compute slots from these numbers, so nothing else has to follow when a row grows on the device.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError

from ..kv_cache import DynamicCache, KVCache, PagedCache, RingCache, StaticCache
from ..kv_cache.paged import PAGE
from ..kv_cache.ring import SPARE
from ..kv_cache.storage import Storage
from ..transfers import Staged, Upload
from .key_ranges import KeyRanges, Paths, key_ranges, masks_of


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
    """Of one forward of R rows. Row r appends counts[r] of W tokens to row rows[r] of the cache.

    Lists are the host's. On the device: at, int32 [3, R] (rows, starts, counts), and tables, int32 [R, width].
    """

    cache: KVCache
    rows: list[int]
    starts: list[int]  # the position of each row's first new token
    counts: list[int]
    first: list[int]  # the earliest position that each row still holds
    at: Staged
    tables: Staged | None = None  # block tables
    wrap: int = 0  # slots of a ring; 0: positions never wrap
    most: int = 0  # positions that a row can have: the sizes of grids and of scratch memory follow from it
    ranges: dict[int | None, KeyRanges] = field(default_factory=dict)  # by the window of a layer

    @property
    def ends(self) -> list[int]:
        """Return the length of each row with its new tokens."""
        return [start + count for start, count in zip(self.starts, self.counts, strict=True)]

    def masks(self, ranges: KeyRanges, like: Tensor) -> list[Tensor | None]:
        """Return the masks of all rows in the dtype of `like`, made by the first layer that asks."""
        if ranges.masks is None:
            masks_of(ranges, self.starts, self.counts, self.first, like)
        assert ranges.masks is not None
        return ranges.masks


def attention_metadata(
    cache: KVCache,
    rows: list[int],
    counts: list[int],
    upload: Upload,
    W: int | None = None,
    windows: Set[int | None] = frozenset({None}),
    paths: list[Paths | None] | None = None,
) -> AttentionMetadata:
    """Make the metadata of appending counts[r] tokens to row rows[r], W by default the most of them.

    windows: of the model's layers. paths: of rows with trees. UserError if there is no room.
    """
    starts, tables, wrap = [cache.length(row) for row in rows], None, 0
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    if isinstance(cache, PagedCache):
        tables, most = upload.put_rows([cache.tables[row] for row in rows], cache.width), cache.width * PAGE
        room = [len(cache.tables[row]) * PAGE for row in rows]
    elif isinstance(cache, StaticCache):
        room, most = [cache.capacity] * len(rows), cache.capacity
    elif isinstance(cache, RingCache):
        wrap, room, most = cache.slots, [start + SPARE for start in starts], max(ends, default=0)
    elif isinstance(cache, DynamicCache):
        room, most = ends, max(ends, default=0)
    else:
        raise UserError(f"a cache of the kind {type(cache).__name__}; expected one of kv_cache/")
    for row, end, its in zip(rows, ends, room, strict=True):
        if end > its:
            raise UserError(f"row {row} of the cache is to hold {end} tokens; it has room for {its}")
    at, first = upload.put([*rows, *starts, *counts], 3, len(rows)), [cache.first(row) for row in rows]
    made = AttentionMetadata(cache, rows, starts, counts, first, at, tables, wrap, most)
    for window in windows:
        made.ranges[window] = key_ranges(
            upload,
            starts,
            counts,
            max(counts, default=0) if W is None else W,
            window,
            first,
            paths or [None] * len(rows),
        )
    return made


def layer_of(cache: KVCache, layer: int) -> Layer:
    """Return a layer of a cache that keeps all rows in one tensor."""
    assert isinstance(cache, StaticCache | RingCache | PagedCache)
    return Layer(cache.keys[layer], cache.values[layer])


def row_of(metadata: AttentionMetadata, layer: int, r: int) -> tuple[Layer, AttentionMetadata]:
    """Return row r of a dynamic cache, [kv_heads, n, head_dim], as a layer of one page, and its own metadata."""
    cache, row = metadata.cache, metadata.rows[r]
    assert isinstance(cache, DynamicCache)
    keys, values = (each[layer][row]._with(lambda tensor: tensor[None]) for each in (cache.keys, cache.values))
    zeros = Staged(torch.zeros(3, 1, dtype=torch.int32, device=keys.values.device))
    return Layer(keys, values), AttentionMetadata(cache, [0], [], [], [], zeros, most=metadata.ends[r])
