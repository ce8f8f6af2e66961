"""`decode_attention` and `flash_prefill`: see attention.cu and prefill.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv_cache import DynamicCache, KVCache
from ..key_ranges import KeyRanges, key_ranges, ranges_of_row
from ..metadata import AttentionMetadata, Layer, in_row, layer_of, places_of, row_of
from .rope import SHIFT, strides_of
from .support import FORMATS, address, dense, floating, on_device, require, stream_of

PART = 256  # positions per block
WIDEST = 256  # features of a head
ON_CORES = 128
BUSY = 264  # blocks that fill a large GPU: two for each of 132 multiprocessors


def check_query(op: str, query: Tensor, cache: KVCache, rows: list[int], counts: list[int]) -> None:
    (R, _, H, D), shape = query.shape, cache.shape
    floating(op, query=query)
    require(op, shape.head_dim == D, f"a head of query has {D} features", f"{shape.head_dim}, as the cache")
    require(op, D <= WIDEST, f"a head has {D} features", f"at most {WIDEST}")
    require(op, H % shape.kv_heads == 0, f"{H} query heads over {shape.kv_heads} of keys", "a multiple")
    require(op, len(rows) == len(counts) == R, f"{len(rows)} rows and {len(counts)} counts", f"{R} of both")


def decode_attention(
    query: Tensor,
    cache: KVCache,
    layer: int,
    rows: list[int],
    counts: list[int],
    masks: list[Tensor | None],
    part: int = PART,
) -> Tensor:
    """Attend with query [R, W, H, head_dim] to each row's tokens and its counts[r] just appended; same shape.

    masks as in the reference. `part`: positions per block, a multiple of 64; the bits depend on it.
    """
    return _attend("decode_attention", query, cache, layer, rows, counts, masks, part)


def flash_prefill(
    query: Tensor, cache: KVCache, layer: int, rows: list[int], counts: list[int], masks: list[Tensor | None]
) -> Tensor:
    """Attend as decode_attention does, for many queries; trees and float32 use decode_attention."""
    return _attend("flash_prefill", query, cache, layer, rows, counts, masks, None)


def unconstrained(
    query: Tensor, cache: KVCache, layer: int, rows: list[int], counts: list[int], masks: list[Tensor | None]
) -> Tensor:
    """Run `decode_attention` with parts that fill the GPU; the bench measures the cost of fixed parts against it."""
    R, W, H, _ = query.shape
    heads = cache.shape.kv_heads
    longest = max([1, *(cache.length(row) + count for row, count in zip(rows, counts, strict=True))])
    blocks = max(1, BUSY // max(1, R * heads * -(-W * (H // heads) // 16)))
    part = -(-longest // (64 * blocks)) * 64
    return decode_attention(query, cache, layer, rows, counts, masks, part)


def _attend(
    op: str,
    query: Tensor,
    cache: KVCache,
    layer: int,
    rows: list[int],
    counts: list[int],
    masks: list[Tensor | None],
    part: int | None,
) -> Tensor:
    check_query(op, query, cache, rows, counts)
    query = dense(query)
    metadata = places_of(f"cuda {op}", cache, rows, counts, query.device)
    ranges = key_ranges(f"cuda {op}", metadata, masks, query.shape[1])
    if not isinstance(cache, DynamicCache):
        return _run(op, query, layer_of(cache, layer), metadata, ranges, part)
    out = []
    for r, row in enumerate(rows):
        own = in_row(query.device)
        out.append(_run(op, query[r : r + 1], row_of(cache, layer, row), own, ranges_of_row(ranges, r), part))
    return torch.cat(out) if out else torch.empty_like(query)


def _run(
    op: str, query: Tensor, layer: Layer, metadata: AttentionMetadata, ranges: KeyRanges, part: int | None
) -> Tensor:
    keys, values = layer.keys.values, layer.values.values
    library = on_device(op, query=query, cache=keys)
    (R, W, H, D), HK = query.shape, keys.shape[1]
    out = torch.empty(R, W, H, D, dtype=query.dtype, device=query.device)
    of_cache, seen = (keys, values, *layer.scales), (ranges.lo, ranges.end, ranges.base, ranges.lines)
    tensors = (query, *of_cache, metadata.rows, metadata.tables, *seen, out)
    width = 0 if metadata.tables is None else metadata.tables.shape[1]
    line = 0 if ranges.lines is None else ranges.lines.shape[2]
    call = [
        FORMATS[query.dtype], FORMATS[keys.dtype], *map(address, tensors), R, W, H, HK, D, width, SHIFT, line,
        metadata.wrap, *strides_of(op, keys), *query.stride()[:3],
    ]  # fmt: skip
    tiles = keys.dtype in (query.dtype, torch.int8) and query.dtype != torch.float32 and D <= ON_CORES
    if part is None and ranges.lines is None and tiles:
        library.flash_prefill(call, stream_of(query))
        return out
    part = PART if part is None else part
    require(op, part > 0 and part % 64 == 0, f"parts of {part} positions", "a multiple of 64")
    parts = max(1, -(-ranges.furthest // part))
    mixed = torch.empty(R, W, H, parts, D, dtype=torch.float32, device=query.device)
    tops, sums = torch.empty(2, R, W, H, parts, dtype=torch.float32, device=query.device)
    library.decode_attention(call, part, parts, address(mixed), address(tops), address(sums), stream_of(query))
    return out
