"""`rope` rotates queries or keys; `rope_append` rotates both and appends keys and values to the cache."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kv_cache import DynamicCache, KVCache
from .. import reference
from ..metadata import layer_of, places_of
from .append import check_new, dense, put
from .slots import offset, tensors_of, ways
from .support import floating, launch, on_device, power, require, same_shape


@triton.jit
def rotated(x, cos, sin, h, d, H, D, s_head):
    """(a, b) -> (a cos - b sin, b cos + a sin) for features half a head apart; rounded as in torch, to x's dtype."""
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
def _rope_append(query, new_keys, new_values, cos, sin, out, keys, values, key_scales, value_scales,
                 rows, starts, counts, tables, T, H, HK, D, q_row, q_token, q_head, k_row, k_token, k_head,
                 v_row, v_token, v_head, t_row, t_token, slots, table_width, s_place, s_head, s_slot,
                 PAGED: tl.constexpr, INT8: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    t, r = tl.program_id(0), tl.program_id(1)
    far = r.to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    table = far * t_row + t * t_token
    y = rotated(query + far * q_row + t * q_token, cos + table, sin + table, h, d, H, D, q_head)
    index = ((far * T + t) * H + h[:, None]) * D + d[None, :]
    tl.store(out + index, y, mask=(h < H)[:, None] & (d < D)[None, :])
    if t < tl.load(counts + r):
        g = tl.arange(0, KV_HEADS)
        at = offset(rows, tables, r, tl.load(starts + r) + t, slots, table_width, s_place, s_slot, PAGED)
        k = rotated(new_keys + far * k_row + t * k_token, cos + table, sin + table, g, d, HK, D, k_head)
        put(k.to(tl.float32), keys, key_scales, at, g, d, HK, D, s_head, INT8)
        source = new_values + far * v_row + t * v_token + g[:, None] * v_head + d[None, :]
        v = tl.load(source, mask=(g < HK)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        put(v, values, value_scales, at, g, d, HK, D, s_head, INT8)


def tables_of(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Return contiguous tables [T, 1, D] or [B, T, 1, D], and their strides by row (0: shared) and token."""
    B, T, _, D = x.shape
    require(op, D % 2 == 0, f"a head has {D} features", "an even number")
    for name, table in (("cos", cos), ("sin", sin)):
        good = table.shape in ((T, 1, D), (1, T, 1, D), (B, T, 1, D))
        require(op, good, f"{name} has shape {list(table.shape)}", f"[{T}, 1, {D}] or [{B}, {T}, 1, {D}]")
    cos, sin = cos.contiguous(), sin.contiguous()
    of_row = T * D if cos.ndim == 4 and cos.shape[0] == B and B > 1 else 0
    require(op, cos.shape == sin.shape, "cos and sin differ in shape", "two tables of one shape")
    return cos, sin, of_row, D


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, head_dim] (RoPE); the tables are [T, 1, head_dim] or [B, T, 1, head_dim]."""
    on_device("rope", x=x, cos=cos, sin=sin)
    floating("rope", x=x, cos=cos, sin=sin)
    x = dense(x)
    B, T, H, D = x.shape
    cos, sin, *strides = tables_of("rope", x, cos, sin)
    out = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
    sizes = {"HEADS": power(H), "BLOCK": power(D)}
    launch(_rope, (T, B), x, cos, sin, out, T, H, D, *x.stride()[:3], *strides, **sizes)
    return out


def rope_append(
    cache: KVCache,
    layer: int,
    rows: list[int],
    counts: list[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Rotate query [R, T, H, head_dim] and key, append key and value [R, T, kv_heads, head_dim]; return the query."""
    op = "rope_append"
    check_new(op, cache, rows, counts, key, value)
    floating(op, query=query, cos=cos, sin=sin)
    on_device(op, query=query, key=key, cos=cos, sin=sin)
    same_shape(op, "query", query, *key.shape[:2], query.shape[2], key.shape[3])
    if isinstance(cache, DynamicCache):  # see append.py
        reference.kv_append(cache, layer, rows, counts, rope(key, cos, sin), value)
        return rope(query, cos, sin)
    query, key, value = dense(query), dense(key), dense(value)
    (R, T, H, D), HK = query.shape, key.shape[2]
    cos, sin, *strides = tables_of(op, query, cos, sin)
    metadata, of_layer = places_of(op, cache, rows, counts, key.device), layer_of(cache, layer)
    tensors, (tables, slots, width) = tensors_of(of_layer), ways(metadata)
    out = torch.empty(R, T, H, D, dtype=query.dtype, device=query.device)
    launch(
        _rope_append, (T, R), query, key, value, cos, sin, out, *tensors,
        metadata.rows, metadata.starts, metadata.counts, tables, T, H, HK, D,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides,
        slots, width, *tensors[0].stride()[:3],
        PAGED=metadata.tables is not None, INT8=of_layer.scales[0] is not None, HEADS=power(H),
        KV_HEADS=power(HK), BLOCK=power(D),
    )  # fmt: skip
    return out
