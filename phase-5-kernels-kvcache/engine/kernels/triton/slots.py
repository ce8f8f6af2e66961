"""../places.py inside a kernel: from a position of a row to where its keys and values lie."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...kv_cache.paged import PAGE
from ..metadata import AttentionMetadata, Layer

NEVER = 1 << 30  # positions that wrap after so many do not


@triton.jit
def offset(rows, tables, r, position, slots, table_width, s_place, s_slot, PAGED: tl.constexpr):
    """Of the first head's features of some positions of the forward's row r, in elements."""
    slot = position % slots
    if PAGED:
        place = tl.load(tables + r * table_width + position // slots).to(tl.int64)
    else:
        place = tl.load(rows + r).to(tl.int64)
    return place * s_place + slot * s_slot


def ways(places: AttentionMetadata) -> tuple[Tensor, int, int]:
    """Page tables (where there are none, something that is not read), slots of a place, width of the tables."""
    if places.tables is None:
        return places.rows, places.wrap or NEVER, 1
    return places.tables, PAGE, places.tables.shape[1]


def tensors_of(layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keys, values, and what int8 is multiplied with; where there is nothing, something that is not read."""
    keys, values = layer.keys.values, layer.values.values
    key_scales, value_scales = layer.scales
    if key_scales is None or value_scales is None:
        return keys, values, keys, values
    return keys, values, key_scales, value_scales
