"""Attention over every kind of cache.

`decode`: a few queries over a long cache, split over the sequence (Flash-Decoding, Dao et al. 2023). A program computes
16 query heads that share a key head over one part, 256 positions. A second kernel merges the parts of a query in order,
by the maxima and sums of an online softmax (Milakov and Gimelshein 2018). Parts and blocks begin at fixed positions, a
query is always one of 16, and hidden keys add an exact zero. So the bits of a query depend neither on the number of
queries nor on other cache entries. In a tree, a program visits the keys of one query's path.

`prefill`: many queries, in tiles that stay on the chip (Dao et al. 2022). A program computes 64 queries of a head over
blocks of 64 keys, up to the last key that one of them sees.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..key_ranges import KeyRanges
from ..launches import results_of_parts
from ..metadata import AttentionMetadata, Layer
from .slots import offset, tensors_of, ways
from .support import INTERPRETED, dot, launch, power

TILE, BLOCK = 16, 64  # query heads of a program of `decode`, keys per block
QUERIES = 64  # of a program of `prefill`


@triton.jit
def absorb(q, keys, values, key_scales, value_scales, at, live, visible, d, D, scale, acc, total, top,
           INT8: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Add a block of keys and values, at the offsets `at`, to an online softmax; return the new acc, total and top.

    q [rows, features]; visible [rows, keys]; keys that are not live are not read. acc: the sum of values with weights
    2^(score - top), total: the sum of these weights, top: the maximum of the scores, in float32.
    """
    inside = live[:, None] & (d < D)[None, :]
    k = tl.load(keys + at[:, None] + d[None, :], mask=inside, other=0)
    if k.dtype != q.dtype:
        k = k.to(tl.float32).to(q.dtype)
    found = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), WIDE) * scale
    if INT8:
        found *= tl.load(key_scales + at // D, mask=live, other=0.0).to(tl.float32)[None, :]
    found = tl.where(visible, found, float("-inf"))
    higher = tl.maximum(top, tl.max(found, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weights, shrink = tl.exp2(found - finite[:, None]), tl.exp2(top - finite)
    total = total * shrink + tl.sum(weights, 1)
    v = tl.load(values + at[:, None] + d[None, :], mask=inside, other=0)
    if INT8:
        weights *= tl.load(value_scales + at // D, mask=live, other=0.0).to(tl.float32)[None, :]
    if v.dtype != q.dtype:
        v = v.to(tl.float32).to(q.dtype)
    return dot(weights.to(q.dtype), v, acc * shrink[:, None], WIDE), total, higher


@triton.jit(do_not_specialize=["W", "line_width", "parts"])  # the same code for 1 query and for 16
def _parts(query, keys, values, key_scales, value_scales, rows, tables, lo, end, base, lines, mixed, tops, sums,
           W, H, G, D, q_row, q_token, q_head, slots, table_width, s_page, s_head, s_slot, line_width, parts, scale,
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

    here = part * PART
    if here >= furthest:  # the grid has parts for the longest row that the cache holds
        return
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, WIDTH), tl.float32)
    for p0 in range(tl.maximum(here, earliest // BLOCK * BLOCK), tl.minimum(here + PART, furthest), BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        live = (p >= earliest) & (p < furthest)  # keys outside may be uninitialised, and are not read
        token = p
        if LINES:
            listed = p - tl.load(base + r)
            index = (r * W + one).to(tl.int64) * line_width + listed
            token = tl.where(listed < 0, p, tl.load(lines + index, mask=live & (listed >= 0), other=0))
        at = offset(rows, tables, r, tl.where(live, token, 0), slots, table_width, s_page, s_slot, PAGED) + h * s_head
        visible = (p[None, :] >= begin[:, None]) & (p[None, :] < stop[:, None])
        acc, total, top = absorb(q, keys, values, key_scales, value_scales, at, live, visible, d, D, scale,
                                 acc, total, top, INT8, WIDE)  # fmt: skip
    of_query = ((r * W + w).to(tl.int64) * H + h * G + g) * parts + part
    tl.store(tops + of_query, top, mask=real)
    tl.store(sums + of_query, total, mask=real)
    tl.store(mixed + of_query[:, None] * D + d[None, :], acc, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _join(mixed, tops, sums, end, out, count, H, D, parts, PART: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Merge the parts of each query head, in order, up to the last that it sees."""
    of_query = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d, real = tl.arange(0, WIDTH), of_query < count
    stop = tl.load(end + of_query // H, mask=real, other=0)
    used = tl.minimum(parts, (tl.max(stop, 0) + PART - 1) // PART)
    inside = real[:, None] & (d < D)[None, :]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for part in range(used):
        at = of_query * parts + part
        there = part * PART < stop
        its = tl.load(tops + at, mask=there, other=float("-inf"))
        higher = tl.maximum(top, its)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        mine, theirs = tl.exp2(top - finite), tl.exp2(its - finite)
        total = total * mine + tl.load(sums + at, mask=there, other=0.0) * theirs
        of_part = tl.load(mixed + at[:, None] * D + d[None, :], mask=inside & there[:, None], other=0.0)
        acc = acc * mine[:, None] + of_part * theirs[:, None]
        top = higher
    found = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # a query that sees nothing gives zeros
    tl.store(out + of_query[:, None] * D + d[None, :], found.to(out.dtype.element_ty), mask=inside)


def decode(
    op: str, part: int, layer: Layer, metadata: AttentionMetadata, ranges: KeyRanges, query: Tensor, out: Tensor
) -> None:
    tensors, (tables, slots, width) = tensors_of(layer), ways(metadata)
    (R, W, H, D), HK = query.shape, tensors[0].shape[1]
    G, parts = H // HK, max(1, triton.cdiv(metadata.most, part))
    between = results_of_parts(query, parts)
    lo, end, rows = ranges.lo.tensor, ranges.end.tensor, metadata.at.tensor[0]
    base, lines = (None if each is None else each.tensor for each in (ranges.base, ranges.lines))
    tiles = triton.cdiv(W * G, TILE) if lines is None else W * triton.cdiv(G, TILE)
    launch(
        _parts, (tiles, parts, R * HK), query, *tensors, rows, tables, lo, end,
        lo if base is None else base, lo if lines is None else lines, *between,
        W, H, G, D, *query.stride()[:3], slots, width, *tensors[0].stride()[:3],
        1 if lines is None else lines.shape[2], parts, math.log2(math.e) / math.sqrt(D),
        PAGED=metadata.tables is not None, INT8=layer.scales[0] is not None, LINES=lines is not None,
        TILE=TILE, BLOCK=BLOCK, PART=part, WIDTH=power(D, 16), WIDE=INTERPRETED,
    )  # fmt: skip
    joined = 16 if INTERPRETED else 1  # on a GPU more programs are faster
    sizes = {"ROWS": joined, "WIDTH": power(D, 16)}
    launch(_join, (triton.cdiv(R * W * H, joined),), *between, end, out, R * W * H, H, D, parts, PART=part, **sizes)


@triton.jit
def _prefill(query, keys, values, key_scales, value_scales, rows, tables, lo, end, out, W, H, G, D,
             q_row, q_token, q_head, slots, table_width, s_page, s_head, s_slot, scale,
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
        at = offset(rows, tables, r, tl.where(live, p, 0), slots, table_width, s_page, s_slot, PAGED) + h // G * s_head
        visible = (p[None, :] >= begin[:, None]) & (p[None, :] < stop[:, None])
        acc, total, top = absorb(q, keys, values, key_scales, value_scales, at, live, visible, d, D, scale,
                                 acc, total, top, INT8, WIDE)  # fmt: skip
    found = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    index = ((r * W + w[:, None]).to(tl.int64) * H + h) * D + d[None, :]
    tl.store(out + index, found.to(out.dtype.element_ty), mask=inside)


def prefill(op: str, layer: Layer, metadata: AttentionMetadata, ranges: KeyRanges, query: Tensor, out: Tensor) -> None:
    tensors, (tables, slots, width) = tensors_of(layer), ways(metadata)
    (R, W, H, D), HK = query.shape, tensors[0].shape[1]
    launch(
        _prefill, (triton.cdiv(W, QUERIES), H, R), query, *tensors, metadata.at.tensor[0], tables,
        ranges.lo.tensor, ranges.end.tensor, out, W, H, H // HK, D, *query.stride()[:3], slots, width,
        *tensors[0].stride()[:3],
        math.log2(math.e) / math.sqrt(D),
        PAGED=metadata.tables is not None, INT8=layer.scales[0] is not None,
        TILE=QUERIES, BLOCK=BLOCK, WIDTH=power(D, 16), WIDE=INTERPRETED,
    )  # fmt: skip
