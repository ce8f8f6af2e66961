"""`flash_prefill`: attention of many queries, in tiles that stay on the chip (Dao et al. 2022).

A program computes 64 queries of a head over blocks of 64 keys, up to the last key that one of them sees. Each token of
a prompt sees a range of positions; trees, whose queries see paths, use `decode_attention`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kv_cache import DynamicCache, KVCache
from ..key_ranges import KeyRanges, key_ranges, ranges_of_row
from ..metadata import AttentionMetadata, Layer, in_row, layer_of, places_of, row_of
from .append import dense
from .attention import check_query, decode_attention, mix, scores_of, soften
from .slots import offset, tensors_of, ways
from .support import INTERPRETED, launch, on_device, power

QUERIES, KEYS = 64, 64


@triton.jit
def _prefill(query, keys, values, key_scales, value_scales, rows, tables, lo, end, out, W, H, G, D,
             q_row, q_token, q_head, slots, table_width, s_place, s_head, s_slot, scale,
             PAGED: tl.constexpr, INT8: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    h, r = tl.program_id(1), tl.program_id(2)
    w = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)
    inside = (w < W)[:, None] & (d < D)[None, :]
    begin = tl.load(lo + r * W + w, mask=w < W, other=2147483647)
    stop = tl.load(end + r * W + w, mask=w < W, other=0)
    q = tl.load(query + r.to(tl.int64) * q_row + w[:, None] * q_token + h * q_head + d[None, :], mask=inside, other=0.0)
    earliest, furthest = tl.min(begin, 0), tl.max(stop, 0)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, WIDTH), tl.float32)
    for p0 in range(earliest // BLOCK * BLOCK, furthest, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        live = (p >= earliest) & (p < furthest)
        at = offset(rows, tables, r, tl.where(live, p, 0), slots, table_width, s_place, s_slot, PAGED) + h // G * s_head
        found = scores_of(q, keys, key_scales, at, live, d, D, scale, INT8, WIDE)
        visible = (p[None, :] >= begin[:, None]) & (p[None, :] < stop[:, None])
        weights, top, shrink = soften(found, visible, top)
        total = total * shrink + tl.sum(weights, 1)
        acc = mix(acc * shrink[:, None], weights, q.dtype, values, value_scales, at, live, d, D, INT8, WIDE)
    found = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    index = ((r * W + w[:, None]).to(tl.int64) * H + h) * D + d[None, :]
    tl.store(out + index, found.to(out.dtype.element_ty), mask=inside)


def flash_prefill(
    query: Tensor, cache: KVCache, layer: int, rows: list[int], counts: list[int], masks: list[Tensor | None]
) -> Tensor:
    """Attend as decode_attention does, with query [R, W, H, head_dim], for many queries."""
    op = "flash_prefill"
    check_query(op, query, cache, rows, counts)
    query = dense(query)
    metadata = places_of(op, cache, rows, counts, query.device)
    ranges = key_ranges(op, metadata, masks, query.shape[1])
    if ranges.lines is not None:
        return decode_attention(query, cache, layer, rows, counts, masks)
    if not isinstance(cache, DynamicCache):
        return _run(query, layer_of(cache, layer), metadata, ranges)
    out = []
    for r in range(len(rows)):
        own = row_of(cache, layer, rows[r])
        out.append(_run(query[r : r + 1], own, in_row(query.device), ranges_of_row(ranges, r)))
    return torch.cat(out) if out else torch.empty_like(query)


def _run(query: Tensor, layer: Layer, metadata: AttentionMetadata, ranges: KeyRanges) -> Tensor:
    tensors, (tables, slots, width) = tensors_of(layer), ways(metadata)
    on_device("flash_prefill", query=query, cache=tensors[0])
    (R, W, H, D), HK = query.shape, tensors[0].shape[1]
    out = torch.empty(R, W, H, D, dtype=query.dtype, device=query.device)
    launch(
        _prefill, (triton.cdiv(W, QUERIES), H, R), query, *tensors, metadata.rows, tables, ranges.lo, ranges.end,
        out, W, H, H // HK, D, *query.stride()[:3], slots, width, *tensors[0].stride()[:3],
        math.log2(math.e) / math.sqrt(D),
        PAGED=metadata.tables is not None, INT8=layer.scales[0] is not None,
        TILE=QUERIES, BLOCK=KEYS, WIDTH=power(D, 16), WIDE=INTERPRETED,
    )  # fmt: skip
    return out
