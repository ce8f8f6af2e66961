"""Every op in plain torch: the reference for other backends, and the fallback if none can run.

python bench.py --only caches
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .key_ranges import KeyRanges
    from .metadata import AttentionMetadata


def times(x: Tensor, other: Tensor) -> Tensor:
    """Return x * other, computed in place if x is contiguous and needs no gradient.

    The weights of a forward pass evict everything else from the CPU's caches. x was just written and is still cached,
    new memory is not.
    """
    return x * other if torch.is_grad_enabled() or not x.is_contiguous() else x.mul_(other)


def plus(x: Tensor, other: Tensor) -> Tensor:
    """Return x + other, computed in x's memory if no gradient is needed, for the reason given in `times`."""
    return x + other if torch.is_grad_enabled() else x.add_(other)


def linear(layer: nn.Module, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Multiply x [..., in] -> [..., out], or only the outputs start .. stop. The layer knows its weight format."""
    product: Tensor = layer(x) if stop is None else layer(x, start, stop)
    return product


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics are float32 in every dtype.

    Three passes over x: its length and two products. On a CPU torch's own takes four: a power, its sum, the products.
    """
    if torch.is_grad_enabled():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x if x.dtype == torch.float32 else x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(constant(eps, x.device), length, length, value=1 / max(1, x.shape[-1])).rsqrt_()
    normed = (wide * scale).mul_(weight)
    return normed if x.dtype == torch.float32 else normed.to(x.dtype)


@lru_cache(maxsize=64)
def constant(value: float, device: torch.device) -> Tensor:
    """Return a cached 0-dim tensor: creating one costs as much as an addition."""
    return torch.tensor(value, device=device)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each feature with its partner half a head away (RoPE): (a, b) -> (a cos - b sin, b cos + a sin).

    x [B, T, H, head_dim]; the tables [T, 1, head_dim] or [B, T, 1, head_dim].
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def kv_append(metadata: AttentionMetadata, layer: int, keys: Tensor, values: Tensor) -> None:
    """Append the first counts[r] of keys and values [R, T, kv_heads, head_dim] to row rows[r] of the cache."""
    cache, whole = metadata.cache, keys.shape[1]
    for at, (row, count) in enumerate(zip(metadata.rows, metadata.counts, strict=True)):
        if count == whole:
            cache.append(layer, row, keys[at], values[at])
        else:
            cache.append(layer, row, keys[at, :count], values[at, :count])


def decode_attention(query: Tensor, metadata: AttentionMetadata, layer: int, ranges: KeyRanges) -> Tensor:
    """Attend with query [R, W, H, head_dim] to each row's tokens and its counts[r] just appended; same shape.

    ranges: the keys that each query sees. Entries that were never written are not read.
    """
    each = zip(metadata.rows, metadata.counts, metadata.masks(ranges, query), strict=True)
    mixed = [
        attend(query[at], *metadata.cache.read(layer, row, count), mask) for at, (row, count, mask) in enumerate(each)
    ]
    return mixed[0][None] if len(mixed) == 1 else torch.stack(mixed)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attend in one row: query [W, H, head_dim] to keys and values [kv_heads, n, head_dim] -> [W, H, head_dim]."""
    (W, H, d), kv = query.shape, len(keys)
    if W == 1 and mask is None:  # query heads that share a key head become its queries
        return F.scaled_dot_product_attention(query.view(1, kv, H // kv, d), keys[None], values[None]).view(1, H, d)
    whole = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], mask, enable_gqa=kv < H
    )
    return whole[0].transpose(0, 1)


def verify_prefix(draft_tokens: Tensor, choices: Tensor, widths: Tensor) -> Tensor:
    """Return how many leading draft_tokens [R, K] equal the target's choices [R, K+1]: int64 [R]."""
    K = draft_tokens.shape[1]
    accepted = (draft_tokens == choices[:, :K]) & (torch.arange(K, device=widths.device) < widths[:, None])
    return accepted.long().cumprod(1).sum(1)
