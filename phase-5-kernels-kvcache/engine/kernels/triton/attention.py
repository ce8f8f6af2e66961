"""`decode_attention`: a few queries over a long cache, split over the sequence (Flash-Decoding, Dao et al. 2023).

A program computes 16 query heads that share a key head over 256 positions. A second kernel merges the parts of a query
in order, by the maxima and sums of an online softmax (Milakov and Gimelshein 2018). Parts and blocks begin at fixed
positions, a query is always one of 16, and hidden keys add an exact zero. So the bits of a query depend neither on the
number of queries nor on other cache entries. In a tree, a program visits the keys of one query's path.
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
from .slots import offset, tensors_of, ways
from .support import INTERPRETED, dot, floating, launch, on_device, power, require

TILE, BLOCK, PART = 16, 64, 256  # query heads of a program, keys per block, positions of a program


@triton.jit
def scores_of(q, keys, key_scales, at, live, d, D, scale, INT8: tl.constexpr, WIDE: tl.constexpr):
    """Multiply q [rows, features] with the keys at the offsets `at`: float32 [rows, keys] scores for exp2."""
    k = tl.load(keys + at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0)
    if k.dtype != q.dtype:
        k = k.to(tl.float32).to(q.dtype)
    found = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), WIDE) * scale
    if INT8:
        found *= tl.load(key_scales + at // D, mask=live, other=0.0).to(tl.float32)[None, :]
    return found


@triton.jit
def mix(acc, weights, kind: tl.constexpr, values, value_scales, at, live, d, D, INT8: tl.constexpr, WIDE: tl.constexpr):
    """Return acc + weights [rows, keys] times the values at the offsets `at`."""
    v = tl.load(values + at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0)
    if INT8:
        weights *= tl.load(value_scales + at // D, mask=live, other=0.0).to(tl.float32)[None, :]
    if v.dtype != kind:
        v = v.to(tl.float32).to(kind)
    return dot(weights.to(kind), v, acc, WIDE)


@triton.jit
def soften(found, visible, top):
    """Return weights 2^(score - maximum) of visible keys, the new maximum, and the factor that rescales old sums."""
    found = tl.where(visible, found, float("-inf"))
    higher = tl.maximum(top, tl.max(found, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp2(found - finite[:, None]), higher, tl.exp2(top - finite)


@triton.jit(do_not_specialize=["W", "line_width", "parts"])  # the same code for 1 query and for 16
def _parts(query, keys, values, key_scales, value_scales, rows, tables, lo, end, base, lines, mixed, tops, sums,
           W, H, G, D, q_row, q_token, q_head, slots, table_width, s_place, s_head, s_slot, line_width, parts, scale,
           PAGED: tl.constexpr, INT8: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
           PART: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    heads = H // G
    r, h = tl.program_id(2) // heads, tl.program_id(2) % heads
    i, d = tl.arange(0, TILE), tl.arange(0, WIDTH)
    if LINES:  # the tile holds heads of one query
        tiles = (G + TILE - 1) // TILE
        one = tile // tiles
        w = one + i * 0
        g = (tile % tiles) * TILE + i
        real = g < G
    else:
        one = 0
        w = (tile * TILE + i) // G
        g = (tile * TILE + i) % G
        real = w < W
    begin = tl.load(lo + r * W + w, mask=real, other=2147483647)
    stop = tl.load(end + r * W + w, mask=real, other=0)
    source = query + r.to(tl.int64) * q_row + w[:, None] * q_token + (h * G + g[:, None]) * q_head + d[None, :]
    q = tl.load(source, mask=real[:, None] & (d < D)[None, :], other=0.0)
    earliest, furthest = tl.min(begin, 0), tl.max(stop, 0)

    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, WIDTH), tl.float32)
    here = part * PART
    for p0 in range(tl.maximum(here, earliest // BLOCK * BLOCK), tl.minimum(here + PART, furthest), BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        live = (p >= earliest) & (p < furthest)  # keys outside may be uninitialised, and are not read
        token = p
        if LINES:
            listed = p - tl.load(base + r)
            index = (r * W + one).to(tl.int64) * line_width + listed
            token = tl.where(listed < 0, p, tl.load(lines + index, mask=live & (listed >= 0), other=0))
        at = offset(rows, tables, r, tl.where(live, token, 0), slots, table_width, s_place, s_slot, PAGED) + h * s_head
        found = scores_of(q, keys, key_scales, at, live, d, D, scale, INT8, WIDE)
        visible = (p[None, :] >= begin[:, None]) & (p[None, :] < stop[:, None])
        weights, top, shrink = soften(found, visible, top)
        total = total * shrink + tl.sum(weights, 1)
        acc = mix(acc * shrink[:, None], weights, q.dtype, values, value_scales, at, live, d, D, INT8, WIDE)
    of_query = ((r * W + w).to(tl.int64) * H + h * G + g) * parts + part
    tl.store(tops + of_query, top, mask=real)
    tl.store(sums + of_query, total, mask=real)
    tl.store(mixed + of_query[:, None] * D + d[None, :], acc, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _join(mixed, tops, sums, out, count, D, parts, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Merge the parts of each query head, in order."""
    of_query = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d, real = tl.arange(0, WIDTH), of_query < count
    inside = real[:, None] & (d < D)[None, :]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for part in range(parts):
        at = of_query * parts + part
        its = tl.load(tops + at, mask=real, other=float("-inf"))
        higher = tl.maximum(top, its)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        mine, theirs = tl.exp2(top - finite), tl.exp2(its - finite)
        total = total * mine + tl.load(sums + at, mask=real, other=0.0) * theirs
        of_part = tl.load(mixed + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        acc = acc * mine[:, None] + of_part * theirs[:, None]
        top = higher
    found = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # a query that sees nothing gives zeros
    tl.store(out + of_query[:, None] * D + d[None, :], found.to(out.dtype.element_ty), mask=inside)


def check_query(op: str, query: Tensor, cache: KVCache, rows: list[int], counts: list[int]) -> None:
    (R, _, H, D), shape = query.shape, cache.shape
    floating(op, query=query)
    on_device(op, query=query)
    require(op, shape.head_dim == D, f"a head of query has {D} features", f"{shape.head_dim}, as the cache")
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

    masks[r] [W, n] is 0 for a visible key and -inf for a hidden one; None: every query sees all keys. Sums are
    float32. `part`: positions of a program, a multiple of 64; the bits depend on it.
    """
    op = "decode_attention"
    check_query(op, query, cache, rows, counts)
    require(op, part % BLOCK == 0 and part > 0, f"parts of {part} positions", f"a multiple of {BLOCK}")
    query = dense(query)
    metadata = places_of(op, cache, rows, counts, query.device)
    ranges = key_ranges(op, metadata, masks, query.shape[1])
    if not isinstance(cache, DynamicCache):
        return _run(query, layer_of(cache, layer), metadata, ranges, part)
    out = []
    for r in range(len(rows)):
        own = row_of(cache, layer, rows[r])
        out.append(_run(query[r : r + 1], own, in_row(query.device), ranges_of_row(ranges, r), part))
    return torch.cat(out) if out else torch.empty_like(query)


def _run(query: Tensor, layer: Layer, metadata: AttentionMetadata, ranges: KeyRanges, part: int) -> Tensor:
    tensors, (tables, slots, width) = tensors_of(layer), ways(metadata)
    on_device("decode_attention", query=query, cache=tensors[0])
    (R, W, H, D), HK = query.shape, tensors[0].shape[1]
    G, parts = H // HK, max(1, triton.cdiv(ranges.furthest, part))
    out = torch.empty(R, W, H, D, dtype=query.dtype, device=query.device)
    mixed = torch.empty(R, W, H, parts, D, dtype=torch.float32, device=query.device)
    tops, sums = torch.empty(2, R, W, H, parts, dtype=torch.float32, device=query.device)
    lines, base = ranges.lines, ranges.base
    tiles = triton.cdiv(W * G, TILE) if lines is None else W * triton.cdiv(G, TILE)
    launch(
        _parts, (tiles, parts, R * HK), query, *tensors, metadata.rows, tables, ranges.lo, ranges.end,
        ranges.lo if base is None else base, ranges.lo if lines is None else lines, mixed, tops, sums,
        W, H, G, D, *query.stride()[:3], slots, width, *tensors[0].stride()[:3],
        1 if lines is None else lines.shape[2], parts, math.log2(math.e) / math.sqrt(D),
        PAGED=metadata.tables is not None, INT8=layer.scales[0] is not None, LINES=lines is not None,
        TILE=TILE, BLOCK=BLOCK, PART=part,
        WIDTH=power(D, 16), WIDE=INTERPRETED,
    )  # fmt: skip
    joined = 16 if INTERPRETED else 1  # on a GPU more programs are faster
    sizes = {"ROWS": joined, "WIDTH": power(D, 16)}
    launch(_join, (triton.cdiv(R * W * H, joined),), mixed, tops, sums, out, R * W * H, D, parts, **sizes)
    return out
