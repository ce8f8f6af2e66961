"""`rope`, `kv_append`, `rope_append`: see rope.cu.

A dynamic cache copies its content for every token; torch does that here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv_cache import DynamicCache, KVCache
from ...kv_cache.paged import PAGE
from .. import reference
from ..metadata import layer_of, places_of
from .support import FORMATS, address, dense, floating, of_dtype, on_device, require, same_shape, stream_of

SHIFT = PAGE.bit_length() - 1


def tables_of(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Return contiguous tables [T, 1, D] or [B, T, 1, D], and their strides by row (0: shared) and token."""
    B, T, _, D = x.shape
    require(op, D % 2 == 0, f"a head has {D} features", "an even number")
    for name, table in (("cos", cos), ("sin", sin)):
        good = table.shape in ((T, 1, D), (1, T, 1, D), (B, T, 1, D))
        require(op, good, f"{name} has shape {list(table.shape)}", f"[{T}, 1, {D}] or [{B}, {T}, 1, {D}]")
    require(op, cos.shape == sin.shape, "cos and sin differ in shape", "two tables of one shape")
    of_dtype(op, x.dtype, cos=cos, sin=sin)
    return cos.contiguous(), sin.contiguous(), T * D if cos.ndim == 4 and len(cos) == B > 1 else 0, D


def strides_of(op: str, values: Tensor) -> list[int]:
    """Return the strides of keys or values [places, kv_heads, slots, D] in heads: by place, head and slot."""
    D = values.shape[-1]
    good = values.stride(-1) == 1 and all(stride % D == 0 for stride in values.stride()[:3])
    require(op, good, f"the cache has strides {values.stride()}", f"contiguous heads of {D} features")
    return [stride // D for stride in values.stride()[:3]]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, head_dim] (RoPE); the tables are [T, 1, head_dim] or [B, T, 1, head_dim]."""
    floating("rope", x=x)
    library = on_device("rope", x=x, cos=cos, sin=sin)
    x = dense(x)
    B, T, H, D = x.shape
    cos, sin, *strides = tables_of("rope", x, cos, sin)
    out = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
    library.rope(
        FORMATS[x.dtype], address(x), address(cos), address(sin), address(out), B, T, H, D, *x.stride()[:3], *strides,
        stream_of(x),
    )  # fmt: skip
    return out


def kv_append(cache: KVCache, layer: int, rows: list[int], counts: list[int], keys: Tensor, values: Tensor) -> None:
    """Append the first counts[r] of keys and values [R, T, kv_heads, head_dim] to row rows[r] of the cache."""
    _append("kv_append", cache, layer, rows, counts, None, keys, values, None)


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
    if isinstance(cache, DynamicCache):
        _append("rope_append", cache, layer, rows, counts, None, rope(key, cos, sin), value, None)
        return rope(query, cos, sin)
    rotated = _append("rope_append", cache, layer, rows, counts, query, key, value, (cos, sin))
    assert rotated is not None
    return rotated


def _append(
    op: str,
    cache: KVCache,
    layer: int,
    rows: list[int],
    counts: list[int],
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    turn: tuple[Tensor, Tensor] | None,
) -> Tensor | None:
    R, T = key.shape[:2]
    same_shape(op, "keys", key, R, T, cache.shape.kv_heads, cache.shape.head_dim)
    same_shape(op, "values", value, *key.shape)
    floating(op, keys=key)
    of_dtype(op, key.dtype, query=query, values=value)
    require(op, len(rows) == len(counts) == R, f"{len(rows)} rows and {len(counts)} counts", f"{R} of both")
    require(op, all(0 <= c <= T for c in counts), f"counts {counts}", f"numbers from 0 to {T}, the tokens there are")
    if isinstance(cache, DynamicCache):
        on_device(op, keys=key, values=value)
        reference.kv_append(cache, layer, rows, counts, key, value)
        return None
    metadata, (keys, values) = places_of(f"cuda {op}", cache, rows, counts, key.device), layer_of(cache, layer)
    key, value = dense(key), dense(value)
    (HK, D), H, out, cos, sin, strides = key.shape[2:], 0, None, None, None, [0, 0]
    if query is not None and turn is not None:
        query = dense(query)
        same_shape(op, "query", query, R, T, query.shape[2], D)
        cos, sin, *strides = tables_of(op, query, *turn)
        H = query.shape[2]
        out = torch.empty(R, T, H, D, dtype=query.dtype, device=query.device)
    library = on_device(op, keys=key, values=value, query=query, cos=cos, sin=sin, cache=keys.values)
    width = 0 if metadata.tables is None else metadata.tables.shape[1]
    all_strides = [
        *((0, 0, 0) if query is None else query.stride()[:3]),
        *key.stride()[:3],
        *value.stride()[:3],
        *strides,
        *strides_of(op, keys.values),
    ]
    library.rope_append(
        FORMATS[key.dtype], FORMATS[keys.values.dtype], address(query), address(key), address(value), address(cos),
        address(sin), address(out), address(keys.values), address(values.values), address(keys.scales),
        address(values.scales), address(metadata.rows), address(metadata.starts), address(metadata.counts),
        address(metadata.tables), width, SHIFT, metadata.wrap, all_strides, R, T, H, HK, D, turn is not None,
        stream_of(key),
    )  # fmt: skip
    return out
