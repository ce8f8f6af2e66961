"""`kv_append`: one program writes keys and values of one new token, for every kind of cache except `dynamic`.

For an int8 cache it quantises: scale = max |x| / 127 over a head's features, rounded to nearest, ties to even, as in
kv_cache/storage.py. A row's tokens after its count are padding and are not written.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...kv_cache import DynamicCache, KVCache
from .. import reference
from ..metadata import layer_of, places_of
from .slots import offset, tensors_of, ways
from .support import floating, launch, on_device, power, require, same_shape


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
def _append(new_keys, new_values, keys, values, key_scales, value_scales, rows, starts, counts, tables,
            HK, D, k_row, k_token, k_head, v_row, v_token, v_head, slots, table_width, s_place, s_head, s_slot,
            PAGED: tl.constexpr, INT8: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    t, r = tl.program_id(0), tl.program_id(1)
    if t < tl.load(counts + r):
        h, d = tl.arange(0, HEADS), tl.arange(0, BLOCK)
        inside = (h < HK)[:, None] & (d < D)[None, :]
        at = offset(rows, tables, r, tl.load(starts + r) + t, slots, table_width, s_place, s_slot, PAGED)
        source = new_keys + r.to(tl.int64) * k_row + t * k_token + h[:, None] * k_head + d[None, :]
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        put(x, keys, key_scales, at, h, d, HK, D, s_head, INT8)
        source = new_values + r.to(tl.int64) * v_row + t * v_token + h[:, None] * v_head + d[None, :]
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        put(x, values, value_scales, at, h, d, HK, D, s_head, INT8)


def check_new(op: str, cache: KVCache, rows: list[int], counts: list[int], keys: Tensor, values: Tensor) -> None:
    """Check that the new tokens match the cache and the rows."""
    R, T = keys.shape[:2]
    same_shape(op, "keys", keys, R, T, cache.shape.kv_heads, cache.shape.head_dim)
    same_shape(op, "values", values, *keys.shape)
    floating(op, keys=keys, values=values)
    on_device(op, keys=keys, values=values)
    require(op, len(rows) == len(counts) == R, f"{len(rows)} rows and {len(counts)} counts", f"{R} of both")
    require(op, all(0 <= c <= T for c in counts), f"counts {counts}", f"numbers from 0 to {T}, the tokens there are")


def dense(x: Tensor) -> Tensor:
    """Return the tensor with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kv_append(cache: KVCache, layer: int, rows: list[int], counts: list[int], keys: Tensor, values: Tensor) -> None:
    """Append the first counts[r] of keys and values [R, T, kv_heads, head_dim] to row rows[r] of the cache.

    A dynamic cache copies its content for every token; torch does that here too.
    """
    check_new("kv_append", cache, rows, counts, keys, values)
    if isinstance(cache, DynamicCache):
        reference.kv_append(cache, layer, rows, counts, keys, values)
        return
    keys, values = dense(keys), dense(values)
    R, T, HK, D = keys.shape
    metadata, of_layer = places_of("kv_append", cache, rows, counts, keys.device), layer_of(cache, layer)
    tensors, (tables, slots, width) = tensors_of(of_layer), ways(metadata)
    on_device("kv_append", keys=keys, cache=tensors[0])
    launch(
        _append, (T, R), keys, values, *tensors, metadata.rows, metadata.starts, metadata.counts, tables,
        HK, D, *keys.stride()[:3], *values.stride()[:3], slots, width, *tensors[0].stride()[:3],
        PAGED=metadata.tables is not None, INT8=of_layer.scales[0] is not None, HEADS=power(HK), BLOCK=power(D),
    )  # fmt: skip
