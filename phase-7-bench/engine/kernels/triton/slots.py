"""../metadata.py inside a kernel: the offset of the keys and values at a position of a row."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...kv_cache.paged import PAGE
from ..metadata import AttentionMetadata, Layer

NEVER = 1 << 30  # modulus of positions that do not wrap


@triton.jit
def offset(rows, tables, r, position, slots, table_width, s_page, s_slot, PAGED: tl.constexpr):
    """Return the offset, in elements, of the first head's features at positions of the forward pass's row r."""
    slot = position % slots
    if PAGED:
        page = tl.load(tables + r * table_width + position // slots).to(tl.int64)
    else:
        page = tl.load(rows + r).to(tl.int64)
    return page * s_page + slot * s_slot


def ways(metadata: AttentionMetadata) -> tuple[Tensor, int, int]:
    """Return block tables (or a placeholder that is not read), slots per page or row, and the width of the tables."""
    if metadata.tables is None:
        return metadata.at.tensor, metadata.wrap or NEVER, 1
    return metadata.tables.tensor, PAGE, metadata.tables.tensor.shape[1]


def tensors_of(layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keys, values and their int8 scales (or placeholders that are not read)."""
    keys, values = layer.keys.values, layer.values.values
    key_scales, value_scales = layer.scales
    if key_scales is None or value_scales is None:
        return keys, values, keys, values
    return keys, values, key_scales, value_scales
