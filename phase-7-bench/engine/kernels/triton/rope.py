"""RoPE, and the append to a cache: one program writes the keys and values of one new token.

For an int8 cache it quantises: scale = max |x| / 127 over a head's features, rounded to nearest, ties to even, as in
kv_cache/storage.py. A row's tokens after its count are padding and are not written.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launches import Rotation
from ..metadata import AttentionMetadata, Layer
from .slots import offset, tensors_of, ways
from .support import launch, power


@triton.jit
def quantised(x):
    """Quantise x float32 [H, D] to int8 levels, as float32; return them and the scales [H] in bfloat16."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), 127.0), 1e-30)
    # Round to nearest, ties to even, explicitly: the interpreter truncates.
    bits = scale.to(tl.int32, bitcast=True)
    scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)
    divisor = tl.zeros(x.shape, tl.float32) + scale.to(tl.float32)[:, None]
    # Adding 1.5 * 2**23 leaves no bits for a fraction: the sum is rounded to nearest, ties to even.
    level = (tl.div_rn(x, divisor) + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(level, -127.0), 127.0), scale


@triton.jit
def put(x, cache, scales, at, h, d, HK, D, s_head, INT8: tl.constexpr):
    """Write x float32 [heads, features] to the cache; `at` is the offset of the token's first head."""
    inside = (h < HK)[:, None] & (d < D)[None, :]
    index = at + h[:, None] * s_head + d[None, :]
    if INT8:
        level, scale = quantised(x)
        tl.store(cache + index, level.to(tl.int8), mask=inside)
        tl.store(scales + (at + h * s_head) // D, scale, mask=h < HK)
    else:
        tl.store(cache + index, x.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def rotated(x, cos, sin, h, d, H, D, s_head):
    """Rotate features half a head apart, (a, b) -> (a cos - b sin, b cos + a sin); rounded as torch does."""
    inside = (h < H)[:, None] & (d < D)[None, :]
    partner = (d + D // 2) % D
    a = tl.load(x + h[:, None] * s_head + d[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + h[:, None] * s_head + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    kind = x.dtype.element_ty
    first = (a * c).to(kind).to(tl.float32)
    return (first + b * s).to(kind)


@triton.jit
def _rope(x, cos, sin, out, T, H, D, s_row, s_token, s_head, t_row, t_token,
          HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    t, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    table = r * t_row + t * t_token
    y = rotated(x + r * s_row + t * s_token, cos + table, sin + table, h, d, H, D, s_head)
    index = ((r * T + t) * H + h[:, None]) * D + d[None, :]
    tl.store(out + index, y, mask=(h < H)[:, None] & (d < D)[None, :])


@triton.jit
def _append(query, new_keys, new_values, cos, sin, out, keys, values, key_scales, value_scales,
            rows, starts, counts, tables, T, H, HK, D, q_row, q_token, q_head, k_row, k_token, k_head,
            v_row, v_token, v_head, t_row, t_token, slots, table_width, s_page, s_head, s_slot,
            ROTATE: tl.constexpr, PAGED: tl.constexpr, INT8: tl.constexpr, HEADS: tl.constexpr,
            KV_HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write one new token's keys and values; ROTATE rotates its queries and keys first."""
    t, r = tl.program_id(0), tl.program_id(1)
    far = r.to(tl.int64)
    d = tl.arange(0, BLOCK)
    table = far * t_row + t * t_token
    if ROTATE:
        h = tl.arange(0, HEADS)
        y = rotated(query + far * q_row + t * q_token, cos + table, sin + table, h, d, H, D, q_head)
        index = ((far * T + t) * H + h[:, None]) * D + d[None, :]
        tl.store(out + index, y, mask=(h < H)[:, None] & (d < D)[None, :])
    if t < tl.load(counts + r):
        g = tl.arange(0, KV_HEADS)
        inside = (g < HK)[:, None] & (d < D)[None, :]
        at = offset(rows, tables, r, tl.load(starts + r) + t, slots, table_width, s_page, s_slot, PAGED)
        source = new_keys + far * k_row + t * k_token
        if ROTATE:
            k = rotated(source, cos + table, sin + table, g, d, HK, D, k_head)
        else:
            k = tl.load(source + g[:, None] * k_head + d[None, :], mask=inside, other=0.0)
        put(k.to(tl.float32), keys, key_scales, at, g, d, HK, D, s_head, INT8)
        source = new_values + far * v_row + t * v_token + g[:, None] * v_head + d[None, :]
        v = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        put(v, values, value_scales, at, g, d, HK, D, s_head, INT8)


def rope(op: str, rotation: Rotation) -> None:
    x, cos, sin, strides, out = rotation
    B, T, H, D = x.shape
    sizes = {"HEADS": power(H), "BLOCK": power(D)}
    launch(_rope, (T, B), x, cos, sin, out, T, H, D, *x.stride()[:3], *strides, **sizes)


def append(
    op: str, layer: Layer, metadata: AttentionMetadata, keys: Tensor, values: Tensor, rotation: Rotation | None
) -> None:
    R, T, HK, D = keys.shape
    query, cos, sin, table_strides, out = rotation or (keys, keys, keys, (0, 0), keys)  # keys: not read
    H, (tables, slots, width), tensors = query.shape[2], ways(metadata), tensors_of(layer)
    launch(
        _append, (T, R), query, keys, values, cos, sin, out, *tensors,
        *metadata.at.tensor, tables, T, H, HK, D,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *table_strides, slots, width,
        *tensors[0].stride()[:3], ROTATE=rotation is not None, PAGED=metadata.tables is not None,
        INT8=layer.scales[0] is not None, HEADS=power(H), KV_HEADS=power(HK), BLOCK=power(D),
    )  # fmt: skip
