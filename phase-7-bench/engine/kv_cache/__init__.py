"""KV caches: keys and values of earlier tokens, so that a forward pass computes the new tokens alone.

| kind | memory | append | supports |
|---|---|---|---|
| dynamic | as long as the sequence | copies the row | trees, any length |
| static | allocated once, for the longest sequence | in place | trees |
| ring | window + 16 tokens, constant | in place, over the oldest | endless sequences, with window attention |
| paged | pages of 16 tokens, when needed | in place | trees, shared prompts |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from common.device import DTYPES
from common.errors import UserError

from .dynamic import DynamicCache
from .paged import PAGE, OutOfBlocks, PagedCache
from .protocol import CacheShape, KVCache
from .ring import SPARE, RingCache
from .static import StaticCache

Kind = Literal["off", "dynamic", "static", "ring", "paged"]
Format = Literal["auto", "float32", "bfloat16", "float16", "int8"]

__all__ = [
    "PAGE",
    "SPARE",
    "CacheShape",
    "DynamicCache",
    "KVCache",
    "KVOptions",
    "OutOfBlocks",
    "PagedCache",
    "RingCache",
    "StaticCache",
    "make_cache",
    "needed_bytes",
]


@dataclass(frozen=True)
class KVOptions:
    """The options `--kv`, `--kv-dtype`, `--kv-slots` and `--kv-pages`; 0: as many as the request can need."""

    kind: Kind = "static"
    format: Format = "auto"
    slots: int = 0
    pages: int = 0


def make_cache(
    options: KVOptions,
    shape: CacheShape,
    rows: int,
    tokens: int,
    computed: torch.dtype,
    device: torch.device,
    window: int | None,
) -> KVCache:
    """Return an empty cache of `rows` rows of at most `tokens` tokens, drafts included.

    `computed`: the dtype that attention reads. UserError for a ring without window attention in every layer.
    """
    dtype = stored(options, computed)
    if options.kind == "dynamic":
        return DynamicCache(shape, rows, dtype, computed, device)
    if options.kind == "ring":
        if window is None:
            raise UserError(
                "--kv ring overwrites tokens before the window, and this model was not trained with window attention "
                "in every layer; use static or paged: past the context they prefill again at a jump"
            )
        return RingCache(shape, rows, window, dtype, computed, device)
    if options.kind == "paged":
        width = -(-tokens // PAGE)
        return PagedCache(shape, rows, options.pages or rows * width, dtype, computed, device, width)
    return StaticCache(shape, rows, options.slots or tokens, dtype, computed, device)


def stored(options: KVOptions, computed: torch.dtype) -> torch.dtype:
    """Return the dtype that a cache stores."""
    return computed if options.format == "auto" else torch.int8 if options.format == "int8" else DTYPES[options.format]


def needed_bytes(
    options: KVOptions, shape: CacheShape, rows: int, tokens: int, computed: torch.dtype, window: int | None
) -> int:
    """Return the bytes of such a cache with all rows at full length, without allocating it."""
    dtype = stored(options, computed)
    per_token = shape.bytes_per_token(dtype.itemsize, 2 if dtype == torch.int8 else 0)
    if options.kind == "paged":
        return (options.pages or rows * -(-tokens // PAGE)) * PAGE * per_token
    if options.kind == "ring" and window is not None:
        return rows * (window + SPARE) * per_token
    return rows * (options.slots or tokens) * per_token
